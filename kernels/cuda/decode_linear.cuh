// One linear layer of a decode step: y = norm(x) W^T + b, or x W^T + b, for 1 to 64 rows at a time, and what follows
// it.
//
// A step reads every weight once and multiplies it with few rows, so its time is that of reading, and of starting
// kernels; hence the norm before and the work behind stand in the same kernel. Work: a block makes 8 kN outputs of
// 16 kM rows; its 8 warps share the columns, 64 bytes of each weight row a turn, kDepth turns under way at once; their
// sums are joined in shared memory, in order. The grid strides over the outputs, so that the norm, which every block
// computes for itself, is computed once a block. 16-bit weights are multiplied by the tensor cores: weights as b, rows
// as a. A lane takes 16 bytes of a weight row and the same columns of its row of x: the sum over columns may be taken
// in any order, so these 8 numbers serve as two fragments, and nothing is shuffled. float32 weights go by plain FMA, to
// prove the chain. float32 sums; x, the sum of all layers so far, is float32 too.
// Bytes: the weights once for 16 kM rows; x, from the second cache, once a block.
#pragma once

#include "decode_choose.cuh"
#include "gelu.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kLinearWarps = 8;
constexpr int kLinearThreads = kLinearWarps * kWarp;
constexpr int kDepth = 4;

// Up to three matrices of `part_rows` rows below each other, (rows, columns) in all; a bias may be null.
template <class T>
struct Matrix {
  const T *weight[3], *bias[3];
  int part_rows, rows, columns;
};

template <class T>
struct RowNorm {
  const T *weight, *bias;
  float eps;
};

enum class Sink {
  kHeads,     // queries go to `narrow`, keys and values into the cache
  kResidual,  // x += y
  kGelu,      // narrow = gelu(y)
  kBest,      // the likeliest outputs of each block go to `best`, the logits to `logits` unless it is null
};

template <class T>
struct Output {
  Sink sink;
  float* x;          // (batch, rows)
  T* narrow;         // (batch, rows), or (batch, part_rows) for queries
  T *keys, *values;  // (batch, n_heads, max_len, head_dim)
  int64_t batch_stride, head_stride, row_stride;
  int head_dim;
  const int64_t* state;  // (batch, kState)
  float* logits;         // (batch, rows)
  uint64_t* best;        // (batch, parts), of which gridDim.x are written
  int parts;
  const DrawOptions* draw;
};

// Elements of a staged row: neighbouring rows lie 64 bytes apart modulo 128, so that reading them meets other banks.
template <class T>
__host__ __device__ inline int staged_stride(int columns) {
  return static_cast<int>(((columns * sizeof(T) + 127) / 128 * 128 + 64) / sizeof(T));
}

// Writes the normalised rows as T. x: (rows, n) float32, n whole pieces of T.
template <class T>
__device__ inline void stage_normed(T* staged, const float* x, RowNorm<T> norm, int rows, int n) {
  const int lane = threadIdx.x % kWarp, stride = staged_stride<T>(n);
  for (int row = threadIdx.x / kWarp; row < rows; row += kLinearWarps) {
    const float* in = x + static_cast<int64_t>(row) * n;
    const auto load = [&](int i) { return *reinterpret_cast<const Pack<float>*>(in + i); };
    float sum = 0.0f, squares = 0.0f;
    for (int i = lane * 4; i < n; i += kWarp * 4) {
      const Pack<float> p = load(i);
      sum += (p.values[0] + p.values[1]) + (p.values[2] + p.values[3]);
    }
    const float mean = warp_sum(sum) / n;
    for (int i = lane * 4; i < n; i += kWarp * 4) {
      const Pack<float> p = load(i);
#pragma unroll
      for (int j = 0; j < 4; ++j) squares += (p.values[j] - mean) * (p.values[j] - mean);
    }
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / n + norm.eps);
    constexpr int kSize = Pack<T>::kSize;
    for (int i = lane * kSize; i < n; i += kWarp * kSize) {
      const Pack<T> w = *reinterpret_cast<const Pack<T>*>(norm.weight + i);
      const Pack<T> b = *reinterpret_cast<const Pack<T>*>(norm.bias + i);
      Pack<T> out;
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        const Pack<float> p = load(i + j);
#pragma unroll
        for (int l = 0; l < 4; ++l)
          out.values[j + l] =
              from_float<T>((p.values[l] - mean) * rstd * to_float(w.values[j + l]) + to_float(b.values[j + l]));
      }
      store_shared(reinterpret_cast<Pack<T>*>(staged + row * stride + i), out);
    }
  }
}

// What a warp has summed of 8 kN outputs of 16 kM rows. Lane 4 g + t holds outputs and rows as mma.cuh says.
template <class T, int kM, int kN>
struct LinearSum {
  static constexpr int kChunk = 32;  // columns a turn
  float c[kM][kN][4] = {};

  // `load` gives the 16 bytes of this lane's columns in one of the rows, zeros behind the last.
  template <class Load>
  __device__ void add(const Pack<uint32_t> (&w)[kN], int rows, Load load) {
    const int g = threadIdx.x % kWarp / 4;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      if (m * 16 >= rows) break;
      const Pack<uint32_t> low = load(m * 16 + g), high = load(m * 16 + 8 + g);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t a[4] = {low.values[2 * half], high.values[2 * half], low.values[2 * half + 1],
                               high.values[2 * half + 1]};
#pragma unroll
        for (int n = 0; n < kN; ++n) mma_16x8x16<T>(c[m][n], a, w[n].values[2 * half], w[n].values[2 * half + 1]);
      }
    }
  }

  // sums: (kN, 16 kM, 8) of this warp.
  __device__ void store(float* sums) const {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          store_shared(sums + (n * 16 * kM + m * 16 + i / 2 * 8 + g) * 8 + t * 2 + i % 2, c[m][n][i]);
  }
};

// float32: lane 4 g + t sums its columns of output g for all rows; the four lanes of an output are joined at the end.
template <>
struct LinearSum<float, 1, 1> {
  static constexpr int kChunk = 16;
  float sums[16] = {};

  template <class Load>
  __device__ void add(const Pack<uint32_t> (&w)[1], int rows, Load load) {
#pragma unroll
    for (int row = 0; row < 16; ++row) {
      if (row >= rows) break;
      const Pack<uint32_t> x = load(row);
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[row] += __uint_as_float(w[0].values[j]) * __uint_as_float(x.values[j]);
    }
  }

  __device__ void store(float* to) const {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int row = 0; row < 16; ++row) {
      float sum = sums[row];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (row % 4 == t) store_shared(to + row * 8 + g, sum);
    }
  }
};

// Where output `o` of row `row` goes, y without its bias; returns the value that kBest compares.
template <class T>
__device__ inline float emit(const Matrix<T>& matrix, const Output<T>& out, int64_t row, int o, float y) {
  const int part = o / matrix.part_rows, column = o % matrix.part_rows;
  if (matrix.bias[part] != nullptr) y += to_float(matrix.bias[part][column]);
  const int64_t place = row * matrix.rows + o;
  switch (out.sink) {
    case Sink::kResidual: out.x[place] += y; break;
    case Sink::kGelu: out.narrow[place] = from_float<T>(gelu(y)); break;
    case Sink::kHeads:
      if (part == 0) {
        out.narrow[row * matrix.part_rows + column] = from_float<T>(y);
      } else {
        const int64_t position = out.state[row * kState + kLength] - 1;
        T* cache = part == 1 ? out.keys : out.values;
        cache[row * out.batch_stride + column / out.head_dim * out.head_stride + position * out.row_stride +
              column % out.head_dim] = from_float<T>(y);
      }
      break;
    case Sink::kBest:
      if (out.logits != nullptr) out.logits[place] = y;
      if (out.draw != nullptr) y = out.draw->perturb(y, o, row, out.state[row * kState + kDrawn]);
      break;
  }
  return y;
}

// input: (batch, columns), float32 where it is normalised, else T.
template <class T, int kM, int kN, bool kNormed>
__global__ void __launch_bounds__(kLinearThreads)
    decode_linear_kernel(Matrix<T> matrix, const void* input, RowNorm<T> norm, Output<T> out, int64_t batch) {
  using Sum = LinearSum<T, kM, kN>;
  constexpr int kSize = Pack<T>::kSize, kOutputs = 8 * kN, kItems = 16 * kM * kOutputs;
  constexpr int kPasses = (kItems + kLinearThreads - 1) / kLinearThreads;
  let_next_begin();
  const int lane = threadIdx.x % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp, n = matrix.columns;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * 16 * kM;
  const int rows = static_cast<int>(batch - first_row < 16 * kM ? batch - first_row : 16 * kM);
  const int tiles = (matrix.rows + kOutputs - 1) / kOutputs, column0 = warp * Sum::kChunk + lane % 4 * kSize;
  // The start of this lane's weights, row lane / 4 of each group of 8 outputs; null behind the last.
  const auto weights = [&](int tile, int group) -> const T* {
    const int o = tile * kOutputs + group * 8 + lane / 4;
    if (o >= matrix.rows) return nullptr;
    return matrix.weight[o / matrix.part_rows] + static_cast<int64_t>(o % matrix.part_rows) * n;
  };
  for (int group = 0; group < kN; ++group) {
    const T* row = weights(blockIdx.x, group);
    for (int i = column0; i < n && row != nullptr && lane % 4 == 0; i += kLinearWarps * Sum::kChunk) prefetch(row + i);
  }
  wait_for_previous();

  T* staged = reinterpret_cast<T*>(dynamic_shared());
  const int stride = staged_stride<T>(n);
  float* sums = reinterpret_cast<float*>(kNormed ? staged + rows * stride : staged);
  if constexpr (kNormed) {
    stage_normed<T>(staged, static_cast<const float*>(input) + first_row * n, norm, rows, n);
    __syncthreads();
  }
  const Pack<uint32_t> zero = {};
  const auto load_x = [&](int row, int column) {
    if (row >= rows || column >= n) return zero;
    if constexpr (kNormed)
      return load_shared(reinterpret_cast<const Pack<uint32_t>*>(staged + row * stride + column));
    else
      return *reinterpret_cast<const Pack<uint32_t>*>(static_cast<const T*>(input) + (first_row + row) * n + column);
  };
  uint64_t best[kPasses] = {};
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const T* row[kN];
#pragma unroll
    for (int group = 0; group < kN; ++group) row[group] = weights(tile, group);
    Sum sum;
    for (int first = column0; first - lane % 4 * kSize < n; first += kDepth * kLinearWarps * Sum::kChunk) {
      Pack<uint32_t> w[kDepth][kN];
#pragma unroll
      for (int i = 0; i < kDepth; ++i)
#pragma unroll
        for (int group = 0; group < kN; ++group) {
          const int column = first + i * kLinearWarps * Sum::kChunk;
          w[i][group] = row[group] != nullptr && column < n ? load_once(row[group] + column) : zero;
        }
#pragma unroll
      for (int i = 0; i < kDepth; ++i) {
        const int column = first + i * kLinearWarps * Sum::kChunk;
        sum.add(w[i], rows, [&](int r) { return load_x(r, column); });
      }
    }
    sum.store(sums + warp * kItems);
    __syncthreads();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int item = static_cast<int>(threadIdx.x) + pass * kLinearThreads;
      const int r = item / 8 % (16 * kM), o = tile * kOutputs + item / (128 * kM) * 8 + item % 8;
      if (item >= kItems) break;
      float y = 0.0f;
#pragma unroll
      for (int i = 0; i < kLinearWarps; ++i) y += load_shared(sums + i * kItems + item);
      if (r >= rows || o >= matrix.rows) continue;
      y = emit(matrix, out, first_row + r, o, y);
      best[pass] = most(best[pass], choice_key(y, o));
    }
    __syncthreads();
  }
  if (out.sink != Sink::kBest) return;
  uint64_t* keys = reinterpret_cast<uint64_t*>(sums);  // (kItems)
#pragma unroll
  for (int pass = 0; pass < kPasses; ++pass) {
    const int item = static_cast<int>(threadIdx.x) + pass * kLinearThreads;
    if (item < kItems) store_shared(keys + item, best[pass]);
  }
  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += kLinearThreads) {
    uint64_t largest = 0;
    for (int i = 0; i < kOutputs; ++i) largest = most(largest, load_shared(keys + (i / 8 * 16 * kM + r) * 8 + i % 8));
    out.best[(first_row + r) * out.parts + blockIdx.x] = largest;
  }
}

// Bytes of shared memory of a block.
template <class T, int kM, int kN, bool kNormed>
size_t linear_shared(int64_t batch, int columns) {
  const int64_t rows = batch < 16 * kM ? batch : 16 * kM;
  return (kNormed ? rows * staged_stride<T>(columns) * sizeof(T) : 0) + kLinearWarps * 128 * kM * kN * sizeof(float);
}

struct LinearLaunch {
  int64_t batch;
  int most_blocks, most_shared;
  bool overlap;
  cudaStream_t stream;
};

template <class T, int kM, int kN, bool kNormed>
cudaError_t decode_linear(const Matrix<T>& matrix, const void* input, RowNorm<T> norm, const Output<T>& out,
                          const LinearLaunch& call) {
  const size_t shared = linear_shared<T, kM, kN, kNormed>(call.batch, matrix.columns);
  if (shared > static_cast<size_t>(call.most_shared)) return cudaErrorInvalidValue;
  const dim3 grid(blocks_for(matrix.rows, 8 * kN, call.most_blocks),
                  static_cast<unsigned>((call.batch + 16 * kM - 1) / (16 * kM)));
  return launch_chained(call.overlap, decode_linear_kernel<T, kM, kN, kNormed>, grid, kLinearThreads, shared,
                        call.stream, matrix, input, norm, out, call.batch);
}

// The instance for this batch whose rows fit into shared memory.
template <class T, bool kNormed>
cudaError_t decode_linear_for_batch(const Matrix<T>& matrix, const void* input, RowNorm<T> norm, const Output<T>& out,
                                    const LinearLaunch& call) {
  if constexpr (sizeof(T) == 2) {
    constexpr int kWide = kNormed ? 2 : 1;
    const auto fits = [&](size_t shared) { return shared <= static_cast<size_t>(call.most_shared); };
    if (call.batch > 32 && fits(linear_shared<T, 4, kWide, kNormed>(call.batch, matrix.columns)))
      return decode_linear<T, 4, kWide, kNormed>(matrix, input, norm, out, call);
    if (call.batch > 16 && fits(linear_shared<T, 2, kWide, kNormed>(call.batch, matrix.columns)))
      return decode_linear<T, 2, kWide, kNormed>(matrix, input, norm, out, call);
  }
  return decode_linear<T, 1, 1, kNormed>(matrix, input, norm, out, call);
}

}  // namespace cuda
}  // namespace fastgpt
