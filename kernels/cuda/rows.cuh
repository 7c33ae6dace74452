// What the kernels on rows of 16-byte pieces share: 8 elements at a time, the dropout mask of rows, sums over parts.
#pragma once

#include "mma.cuh"
#include "philox.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kGroup = 8;  // elements a thread takes together: one load of 16-bit numbers, two of float32
constexpr int kRowsThreads = 128;

template <class T>
__device__ inline void load_group(float (&to)[kGroup], const T* from) {
#pragma unroll
  for (int i = 0; i < kGroup; i += Pack<T>::kSize) {
    const Pack<T> p = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) to[i + j] = to_float(p.values[j]);
  }
}

// Stores the group rounded to T, and leaves it rounded.
template <class T>
__device__ inline void store_group(T* to, float (&from)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; i += Pack<T>::kSize) {
    Pack<T> p;
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) {
      p.values[j] = from_float<T>(from[i + j]);
      from[i + j] = to_float(p.values[j]);
    }
    *reinterpret_cast<Pack<T>*>(to + i) = p;
  }
}

// Bit j: whether element j of group `group` of a row is kept, as fastgpt/ops/philox.py draws it for rows. One draw
// serves 8 groups, so the 8 lanes whose groups lie in the same 64 columns draw one each and exchange them: all lanes
// of the warp must call, lane l with a group whose last three bits are those of l.
__device__ inline uint32_t keep_group(const Dropout& dropout, int64_t row, int group) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t mine = dropout.keep(static_cast<uint32_t>(group / 8 * 8 + lane % 8), static_cast<uint32_t>(row),
                                     static_cast<uint32_t>(row >> 32));
  uint32_t bits = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) bits |= (__shfl_sync(0xffffffffu, mine, lane / 8 * 8 + j) >> (lane % 8) & 1u) << j;
  return bits;
}

__device__ inline void drop_group(float (&x)[kGroup], uint32_t keep, float scale) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) x[j] = keep >> j & 1u ? x[j] * scale : 0.0f;
}

constexpr int kPartColumns = 32, kPartLanes = 8;

// first, second = the sums over `parts` of partial (parts, kinds, n), in an order that is always the same. `second`
// only where kinds is 2.
template <class W>
__global__ void __launch_bounds__(kPartColumns* kPartLanes)
    add_parts_kernel(W* first, W* second, const float* partial, int parts, int kinds, int n) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // (kPartLanes, kPartColumns)
  const int column = static_cast<int>(blockIdx.x) * kPartColumns + static_cast<int>(threadIdx.x);
  for (int kind = 0; kind < kinds; ++kind) {
    float sum = 0.0f;
    if (column < n) {
#pragma unroll 4
      for (int part = threadIdx.y; part < parts; part += kPartLanes)
        sum += partial[(static_cast<int64_t>(part) * kinds + kind) * n + column];
    }
    store_shared(shared + threadIdx.y * kPartColumns + threadIdx.x, sum);
    __syncthreads();
    if (threadIdx.y == 0 && column < n) {
      float all = 0.0f;
      for (int i = 0; i < kPartLanes; ++i) all += load_shared(shared + i * kPartColumns + threadIdx.x);
      (kind == 0 ? first : second)[column] = from_float<W>(all);
    }
    __syncthreads();
  }
}

template <class W>
cudaError_t add_parts(W* first, W* second, const float* partial, int parts, int kinds, int n, cudaStream_t stream) {
  return launch(add_parts_kernel<W>, static_cast<unsigned>((n + kPartColumns - 1) / kPartColumns),
                dim3(kPartColumns, kPartLanes), kPartColumns * kPartLanes * sizeof(float), stream, first, second,
                partial, parts, kinds, n);
}

}  // namespace cuda
}  // namespace fastgpt
