// GELU of x + bias over rows, with the gradient of the bias in the same pass; the formulas stand in gelu.cuh.
//
// Work: a warp takes 256 columns of a row, 8 a lane, and goes on with every (4 gridDim.y)-th row, so that the bias and
// its gradient's sums stay in registers; the warps of a block are joined in shared memory, the blocks by
// add_parts_kernel, in order. Rows of whole groups of 8, aligned to 16 bytes. Bytes: as gelu.cuh.
#pragma once

#include "gelu.cuh"
#include "rows.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kGeluWarps = kRowsThreads / kWarp;

// out, x: (rows, n)
template <class T, class W>
__global__ void __launch_bounds__(kRowsThreads)
    bias_gelu_forward_kernel(T* out, const T* x, const W* bias, int64_t rows, int n) {
  const int column = (static_cast<int>(blockIdx.x) * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kGroup;
  if (column >= n) return;
  float b[kGroup];
  load_group(b, bias + column);
  const int64_t step = static_cast<int64_t>(gridDim.y) * kGeluWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.y) * kGeluWarps + threadIdx.x / kWarp; row < rows; row += step) {
    float v[kGroup];
    load_group(v, x + row * n + column);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) v[j] = gelu(v[j] + b[j]);
    store_group(out + row * n + column, v);
  }
}

// partial: (gridDim.y, n)
template <class T, class W>
__global__ void __launch_bounds__(kRowsThreads)
    bias_gelu_backward_kernel(T* dx, float* partial, const T* dout, const T* x, const W* bias, int64_t rows, int n) {
  const int lane = threadIdx.x % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int column = (static_cast<int>(blockIdx.x) * kWarp + lane) * kGroup;
  float b[kGroup] = {}, sums[kGroup] = {};
  if (column < n) {
    load_group(b, bias + column);
    const int64_t step = static_cast<int64_t>(gridDim.y) * kGeluWarps;
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kGeluWarps + warp; row < rows; row += step) {
      float v[kGroup], d[kGroup];
      load_group(v, x + row * n + column);
      load_group(d, dout + row * n + column);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        v[j] = d[j] * gelu_derivative(v[j] + b[j]);
        sums[j] += v[j];
      }
      store_group(dx + row * n + column, v);
    }
  }
  float* shared = reinterpret_cast<float*>(dynamic_shared());  // (kGeluWarps, kGroup, kWarp)
#pragma unroll
  for (int j = 0; j < kGroup; ++j) store_shared(shared + (warp * kGroup + j) * kWarp + lane, sums[j]);
  __syncthreads();
  if (column >= n) return;
  for (int j = warp; j < kGroup; j += kGeluWarps) {
    float sum = 0.0f;
    for (int i = 0; i < kGeluWarps; ++i) sum += load_shared(shared + (i * kGroup + j) * kWarp + lane);
    partial[static_cast<int64_t>(blockIdx.y) * n + column + j] = sum;
  }
}

inline dim3 bias_gelu_grid(int n, int parts) {
  return dim3(static_cast<unsigned>((n + kWarp * kGroup - 1) / (kWarp * kGroup)), static_cast<unsigned>(parts));
}

template <class T, class W>
cudaError_t bias_gelu_forward(T* out, const T* x, const W* bias, int64_t rows, int n, int parts, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return launch(bias_gelu_forward_kernel<T, W>, bias_gelu_grid(n, parts), kRowsThreads, 0, stream, out, x, bias, rows,
                n);
}

template <class T, class W>
cudaError_t bias_gelu_backward(T* dx, W* dbias, float* partial, const T* dout, const T* x, const W* bias, int64_t rows,
                               int n, int parts, cudaStream_t stream) {
  const cudaError_t error = launch(bias_gelu_backward_kernel<T, W>, bias_gelu_grid(n, parts), kRowsThreads,
                                   kRowsThreads * kGroup * sizeof(float), stream, dx, partial, dout, x, bias, rows, n);
  if (error != cudaSuccess) return error;
  return add_parts(dbias, static_cast<W*>(nullptr), static_cast<const float*>(partial), parts, 1, n, stream);
}

}  // namespace cuda
}  // namespace fastgpt
