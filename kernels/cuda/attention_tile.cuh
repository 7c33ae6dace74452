// Tiles of queries, keys and values in shared memory, and products with them: what the attention kernels share.
//
// A tile is rows x kD 16-bit numbers in chunks of 16 bytes; chunk c of row r stands at c ^ (r % 8), so that the eight
// rows of one matrix that ldmatrix reads lie in eight different groups of four banks.
#pragma once

#include "mma.cuh"
#include "philox.cuh"

namespace fastgpt {
namespace cuda {

constexpr float kLog2E = 1.4426950408889634f;

// (batch, n_heads, length, head_dim) with a contiguous last axis; strides in elements, multiples of 8, and an address
// that is a multiple of 16 bytes.
template <class T>
struct Heads {
  T* data;
  int64_t batch_stride, head_stride, row_stride;

  __device__ T* head(int64_t batch, int64_t head) const { return data + batch * batch_stride + head * head_stride; }
};

struct AttentionSizes {
  int64_t batch, n_heads;
  int q_len, k_len, head_dim;  // positions stay below 2^31 - 256, so that those of a block need 32 bits
  float scale;                 // positive
};

template <class T, int kD>
__device__ inline T* chunk_of(T* tile, int row, int chunk) {
  return tile + row * kD + ((chunk ^ (row & 7)) * 8);
}

// Starts the copies of rows first_row .. first_row + kRows - 1 into a tile; what lies behind `length` or head_dim is 0.
template <class T, int kD, int kRows, int kThreads>
__device__ inline void copy_rows(T* tile, const T* head, int64_t row_stride, int first_row, int length, int head_dim) {
  constexpr int kChunks = kD / 8;
  static_assert(kRows * kChunks % kThreads == 0, "every thread copies the same number of chunks");
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int index = i * kThreads + static_cast<int>(threadIdx.x);
    const int row = index / kChunks, chunk = index % kChunks;
    const int left = (head_dim - chunk * 8) * 2;
    const bool inside = first_row + row < length && left > 0;
    // A copy of 0 bytes must still name an address that exists.
    const T* from = inside ? head + static_cast<int64_t>(first_row + row) * row_stride + chunk * 8 : head;
    copy_async_16(chunk_of<T, kD>(tile, row, chunk), from, inside ? (left < 16 ? left : 16) : 0);
  }
}

// The left factor of a product: rows first_row .. + 15 of a tile, columns 16 step .. + 15.
template <class T, int kD>
__device__ inline void load_left(uint32_t (&a)[4], T* tile, int first_row, int step) {
  const int lane = threadIdx.x % kWarp;
  load_matrices(a, chunk_of<T, kD>(tile, first_row + lane % 16, step * 2 + lane / 16));
}

// sums[.][n] += left * tile^T for the columns 8 n .. 8 n + 7, which are rows of the tile. left: kTiles times (16, kD),
// by load(a, tile, step); each right factor is read once for all of them.
template <class T, int kD, int kRows, int kTiles, class LoadLeft>
__device__ inline void multiply_by_rows(float (&sums)[kTiles][kRows / 8][4], T* tile, LoadLeft load) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) load(a[t], t, step);
#pragma unroll
    for (int pair = 0; pair < kRows / 16; ++pair) {
      uint32_t b[4];
      load_matrices(b, chunk_of<T, kD>(tile, pair * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_16x8x16<T>(sums[t][2 * pair], a[t], b[0], b[1]);
        mma_16x8x16<T>(sums[t][2 * pair + 1], a[t], b[2], b[3]);
      }
    }
  }
}

// sums[.][n] += left * tile for the columns 8 n .. 8 n + 7 of the tile; left: kTiles times (16, kRows), the
// accumulators of an earlier product, rounded here.
template <class T, int kD, int kRows, int kTiles>
__device__ inline void multiply_by_columns(float (&sums)[kTiles][kD / 8][4], const float (&left)[kTiles][kRows / 8][4],
                                           T* tile) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 0; step < kRows / 16; ++step) {
    uint32_t a[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&c)[4] = left[t][2 * step + i / 2];
        a[t][i] = pack_pair<T>(c[i % 2 * 2], c[i % 2 * 2 + 1]);
      }
#pragma unroll
    for (int pair = 0; pair < kD / 16; ++pair) {
      uint32_t b[4];
      load_matrices_transposed(b, chunk_of<T, kD>(tile, step * 16 + lane % 16, pair * 2 + lane / 16));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_16x8x16<T>(sums[t][2 * pair], a[t], b[0], b[1]);
        mma_16x8x16<T>(sums[t][2 * pair + 1], a[t], b[2], b[3]);
      }
    }
  }
}

// Writes the rows first_row and first_row + 8 of a lane's accumulators, times `scales`, where they exist.
template <class T, int kD>
__device__ inline void store_rows(T* head, int64_t row_stride, int row, int length, int head_dim,
                                  const float (&sums)[kD / 8][4], float scale0, float scale1) {
  const int column0 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float scale = half ? scale1 : scale0;
    if (row + half * 8 >= length) continue;
    T* to = head + static_cast<int64_t>(row + half * 8) * row_stride;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      const int column = n * 8 + column0;
      const float low = sums[n][half * 2] * scale, high = sums[n][half * 2 + 1] * scale;
      if (head_dim % 2 == 0 && column < head_dim) {
        *reinterpret_cast<uint32_t*>(to + column) = pack_pair<T>(low, high);
      } else {
        if (column < head_dim) to[column] = from_float<T>(low);
        if (column + 1 < head_dim) to[column + 1] = from_float<T>(high);
      }
    }
  }
}

// The sum, and the largest, over the four lanes that share a row of accumulators.
__device__ inline float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ inline float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The product of two rows, 8 at a time: four lanes a row. Both begin at multiples of 16 bytes.
template <int kD, class T>
__device__ inline float row_product(const T* a, const T* b, int head_dim) {
  float sum = 0.0f;
  const int t = threadIdx.x % 4, whole = head_dim / 8 * 8;
#pragma unroll
  for (int i = 0; i < kD; i += 32) {
    if (i + t * 8 >= whole) continue;
    const Pack<T> x = *reinterpret_cast<const Pack<T>*>(a + i + t * 8);
    const Pack<T> y = *reinterpret_cast<const Pack<T>*>(b + i + t * 8);
#pragma unroll
    for (int e = 0; e < 8; ++e) sum += to_float(x.values[e]) * to_float(y.values[e]);
  }
  for (int i = whole + t; i < head_dim; i += 4) sum += to_float(a[i]) * to_float(b[i]);
  return row_sum(sum);
}

// The dropout mask of kQueries queries against 64 keys, by kThreads threads: bit s of byte (query, r) is key 8 s + r.
template <int kQueries, int kThreads>
__device__ inline void draw_mask(uint32_t* mask, int64_t first_query, int64_t first_key, uint32_t head,
                                 const Dropout& dropout) {
  for (int i = threadIdx.x % kThreads; i < kQueries * 2; i += kThreads) {
    const uint32_t c0 = static_cast<uint32_t>(first_key / 8) + i % 2 * 4,
                   c1 = static_cast<uint32_t>(first_query + i / 2);
    uint32_t bytes = 0;
#pragma unroll 1
    for (int r = 0; r < 4; ++r) bytes |= dropout.keep(c0 + r, c1, head) << (8 * r);
    store_shared(mask + i, bytes);
  }
}

}  // namespace cuda
}  // namespace fastgpt
