// Attention of one new query per row over a key-value cache, of which each row fills its own length.
//
//   out = sum_j p_j v_j / sum_j p_j,  p_j = e^(s_j - m),  s_j = softmax_scale * q . k_j,  m = max_j s_j,  j < length
//
// Work: the keys of each head are cut into `splits` equal parts of max_len, a block each, so that few rows fill the
// chip too; a block whose part lies behind the row's length leaves an empty sum. 4 to 32 lanes share a key, 16 bytes
// each; a group of lanes keeps m, l = sum p_j and acc = sum p_j v_j of its keys and rescales them when m grows. Groups
// are joined by shuffles, warps in shared memory, the parts of a head by a second kernel, in order: the result does not
// depend on timing. The lengths are read on the device, so that a captured graph serves growing rows. Bytes: each key
// and value once. What lies behind a row's length is never read. float32 sums. Papers: Milakov, Gimelshein, "Online
// normalizer calculation for softmax", 2018; Dao et al., "Flash-Decoding", 2023.
#pragma once

#include "grid_barrier.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kDecodeWarps = 4;

// (batch, n_heads, max_len, head_dim), rows of whole 16-byte pieces.
template <class T>
struct CacheView {
  const T* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct DecodeSizes {
  int64_t batch, n_heads, max_len;
  int head_dim, splits;
  int lanes;  // that share a key: 4, 8, 16 or 32
  float scale;
};

// A sum over some keys. kPacks: pieces of 16 bytes of a key that one lane holds.
template <class T, int kPacks>
struct PartialSum {
  static constexpr int kSize = Pack<T>::kSize;
  float m = -INFINITY, l = 0.0f;
  float acc[kPacks][kSize] = {};

  __device__ void add(float score, const Pack<T> (&v)[kPacks]) {
    const float largest = fmaxf(m, score), correction = m == -INFINITY ? 0.0f : fast_exp2(m - largest);
    const float p = fast_exp2(score - largest);
    m = largest;
    l = l * correction + p;
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) acc[i][j] = acc[i][j] * correction + p * to_float(v[i].values[j]);
  }

  // Adds the sum of the lane at distance `step`.
  __device__ void join(int step) {
    const float other_m = __shfl_xor_sync(0xffffffffu, m, step), other_l = __shfl_xor_sync(0xffffffffu, l, step);
    const float largest = fmaxf(m, other_m);
    const float mine = m == -INFINITY ? 0.0f : fast_exp2(m - largest);
    const float theirs = other_m == -INFINITY ? 0.0f : fast_exp2(other_m - largest);
    m = largest;
    l = l * mine + other_l * theirs;
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j)
        acc[i][j] = acc[i][j] * mine + __shfl_xor_sync(0xffffffffu, acc[i][j], step) * theirs;
  }
};

// Floats of one warp's sum in shared memory: whole pieces of 16 bytes.
__host__ __device__ inline int shared_decode_stride(int head_dim) { return (2 + head_dim + 3) / 4 * 4; }

// Joins `count` sums (m, l, acc[head_dim]) that stand `stride` apart, at one position d of acc; gives m and l too.
template <class Load>
__device__ inline float join_parts(int count, int64_t stride, int d, float& m, float& l, Load load) {
  m = -INFINITY;
  for (int i = 0; i < count; ++i) m = fmaxf(m, load(i * stride));
  float acc = 0.0f;
  l = 0.0f;
  for (int i = 0; i < count; ++i) {
    const float part_m = load(i * stride);
    if (part_m == -INFINITY) continue;
    const float weight = fast_exp2(part_m - m);
    l += load(i * stride + 1) * weight;
    acc += load(i * stride + 2 + d) * weight;
  }
  return acc;
}

// The sum over the keys begin .. end - 1 of one head, written to `to`: m in powers of 2, l, acc[head_dim], float32. By
// a block of kWarps warps; shared: (kWarps, shared_decode_stride(head_dim)). kFresh: other blocks of this launch have
// written what is read, or will read what is written.
template <class T, int kPacks, int kWarps = kDecodeWarps, bool kFresh = false>
__device__ inline void attend_part(float* to, float* shared, const T* q_row, const T* k_head, int64_t k_stride,
                                   const T* v_head, int64_t v_stride, int64_t begin, int64_t end,
                                   const DecodeSizes& sizes) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int keys = kWarp / sizes.lanes, mine = lane % sizes.lanes;
  const float scale2 = sizes.scale * 1.4426950408889634f;

  Pack<T> zero;
#pragma unroll
  for (int j = 0; j < kSize; ++j) zero.values[j] = from_float<T>(0.0f);
  // Piece i of this lane, or zeros behind head_dim.
  const auto load = [&](const T* row, int i) {
    const int column = (mine + i * sizes.lanes) * kSize;
    if (column >= sizes.head_dim) return zero;
    const Pack<T>* from = reinterpret_cast<const Pack<T>*>(row + column);
    if constexpr (kFresh)
      return read_l2(from);
    else
      return *from;
  };
  const auto store = [&](float* address, float value) {
    if constexpr (kFresh)
      write_l2(address, value);
    else
      *address = value;
  };
  Pack<T> query[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) query[i] = load(q_row, i);

  PartialSum<T, kPacks> sum;
  for (int64_t first = begin + warp * keys; first < end; first += kWarps * keys) {
    const int64_t key = first + lane / sizes.lanes;
    const bool exists = key < end;
    float score = 0.0f;
    Pack<T> value[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      const Pack<T> piece = exists ? load(k_head + key * k_stride, i) : zero;
      value[i] = exists ? load(v_head + key * v_stride, i) : zero;
#pragma unroll
      for (int j = 0; j < kSize; ++j) score += to_float(query[i].values[j]) * to_float(piece.values[j]);
    }
    for (int step = sizes.lanes / 2; step > 0; step /= 2) score += __shfl_xor_sync(0xffffffffu, score, step);
    if (exists) sum.add(score * scale2, value);
  }
  for (int step = sizes.lanes; step < kWarp; step *= 2) sum.join(step);

  const int shared_stride = shared_decode_stride(sizes.head_dim);
  if (lane < sizes.lanes) {
    float* warp_sum_place = shared + warp * shared_stride;
    if (lane == 0) {
      store_shared(warp_sum_place, sum.m);
      store_shared(warp_sum_place + 1, sum.l);
    }
#pragma unroll
    for (int i = 0; i < kPacks; ++i)
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const int column = (mine + i * sizes.lanes) * kSize + j;
        if (column < sizes.head_dim) store_shared(warp_sum_place + 2 + column, sum.acc[i][j]);
      }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < sizes.head_dim; d += kWarps * kWarp) {
    float m, l;
    const float acc = join_parts(kWarps, shared_stride, d, m, l, [&](int64_t i) { return load_shared(shared + i); });
    store(to + 2 + d, acc);
    if (d > 0) continue;
    store(to, m);
    store(to + 1, l);
  }
}

// partial: (batch * n_heads, splits, 2 + head_dim) float32, as attend_part writes them.
template <class T, int kPacks>
__global__ void __launch_bounds__(kDecodeWarps* kWarp)
    decode_attention_kernel(float* partial, const T* q, int64_t q_batch_stride, int64_t q_head_stride, CacheView<T> k,
                            CacheView<T> v, const int64_t* lengths, DecodeSizes sizes) {
  const int64_t head = blockIdx.x / sizes.splits, batch = head / sizes.n_heads, h = head % sizes.n_heads;
  const int split = static_cast<int>(blockIdx.x % sizes.splits);
  const int64_t part = (sizes.max_len + sizes.splits - 1) / sizes.splits;
  const int64_t length = lengths[batch] < sizes.max_len ? lengths[batch] : sizes.max_len;
  const int64_t begin = split * part, end = begin + part < length ? begin + part : length;
  attend_part<T, kPacks>(partial + static_cast<int64_t>(blockIdx.x) * (2 + sizes.head_dim),
                         reinterpret_cast<float*>(dynamic_shared()), q + batch * q_batch_stride + h * q_head_stride,
                         k.data + batch * k.batch_stride + h * k.head_stride, k.row_stride,
                         v.data + batch * v.batch_stride + h * v.head_stride, v.row_stride, begin, end, sizes);
}

template <class T>
__global__ void decode_attention_join_kernel(T* out, const float* partial, int64_t heads, int head_dim, int splits) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= heads * head_dim) return;
  const int64_t stride = 2 + head_dim;
  const float* parts = partial + index / head_dim * splits * stride;
  float m, l;
  const float acc =
      join_parts(splits, stride, static_cast<int>(index % head_dim), m, l, [&](int64_t i) { return parts[i]; });
  out[index] = from_float<T>(acc / l);
}

// Lanes that share a key of so many pieces of 16 bytes.
inline int lanes_for(int pieces) {
  int lanes = 4;
  while (lanes < kWarp && lanes < pieces) lanes *= 2;
  return lanes;
}

template <class T>
cudaError_t decode_attention(T* out, float* partial, const T* q, int64_t q_batch_stride, int64_t q_head_stride,
                             CacheView<T> k, CacheView<T> v, const int64_t* lengths, DecodeSizes sizes,
                             cudaStream_t stream) {
  const int64_t heads = sizes.batch * sizes.n_heads;
  if (heads == 0) return cudaSuccess;
  const int pieces = (sizes.head_dim + Pack<T>::kSize - 1) / Pack<T>::kSize;
  sizes.lanes = lanes_for(pieces);
  if (pieces > 2 * kWarp || heads * sizes.splits > 0x7fffffff || heads * sizes.head_dim > (int64_t{0x7fffffff} << 7))
    return cudaErrorInvalidValue;
  const auto kernel = pieces > kWarp ? decode_attention_kernel<T, 2> : decode_attention_kernel<T, 1>;
  const cudaError_t error = launch(kernel, static_cast<unsigned>(heads * sizes.splits), kDecodeWarps * kWarp,
                                   kDecodeWarps * shared_decode_stride(sizes.head_dim) * sizeof(float), stream, partial,
                                   q, q_batch_stride, q_head_stride, k, v, lengths, sizes);
  if (error != cudaSuccess) return error;
  return launch(decode_attention_join_kernel<T>, static_cast<unsigned>((heads * sizes.head_dim + 127) / 128), 128, 0,
                stream, out, static_cast<const float*>(partial), heads, sizes.head_dim, sizes.splits);
}

}  // namespace cuda
}  // namespace fastgpt
