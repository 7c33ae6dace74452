// Layer normalisation; the formulas stand in kernels/cpu/layer_norm.h.
//
// Work: forward and dx, one warp a row, the warps of a block striding over the rows; a row of 768 stays in L1 between
// the passes (mean, variance about that mean, output). dweight and dbias: blocks of 32 columns x 8 rows sum their part
// of the rows into `partial`, and a last kernel adds the parts in order, so that the result does not depend on timing.
// Bytes: forward one read and one write of the tensor, backward four reads and one write (the column sums read again).
// Paper: Ba, Kiros, Hinton, "Layer Normalization", 2016.
#pragma once

#include "mma.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kRowsPerBlock = 4;  // warps
constexpr int kColumnsPerBlock = 32;
constexpr int kRowLanes = 8;

template <class T, class W>
__global__ void layer_norm_forward_kernel(T* out, float* mean_out, float* rstd_out, const T* x, const W* weight,
                                          const W* bias, int64_t rows, int64_t n, int64_t x_stride, float eps) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp; row < rows; row += step) {
    const T* in = x + row * x_stride;
    float sum = 0.0f;
    for (int64_t i = lane; i < n; i += kWarp) sum += to_float(in[i]);
    const float mean = warp_sum(sum) / n;
    float squares = 0.0f;
    for (int64_t i = lane; i < n; i += kWarp) {
      const float centred = to_float(in[i]) - mean;
      squares += centred * centred;
    }
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / n + eps);
    if (lane == 0) {
      mean_out[row] = mean;
      rstd_out[row] = rstd;
    }
    for (int64_t i = lane; i < n; i += kWarp) {
      const float normalised = (to_float(in[i]) - mean) * rstd;
      out[row * n + i] = from_float<T>(normalised * to_float(weight[i]) + to_float(bias[i]));
    }
  }
}

template <class T, class W>
__global__ void layer_norm_backward_kernel(T* dx, const T* dout, const T* x, const W* weight, const float* mean,
                                           const float* rstd, int64_t rows, int64_t n, int64_t dout_stride,
                                           int64_t x_stride) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp; row < rows; row += step) {
    const T *in = x + row * x_stride, *d = dout + row * dout_stride;
    const float m = mean[row], r = rstd[row];
    float sum_g = 0.0f, sum_gh = 0.0f;
    for (int64_t i = lane; i < n; i += kWarp) {
      const float g = to_float(d[i]) * to_float(weight[i]);
      sum_g += g;
      sum_gh += g * (to_float(in[i]) - m) * r;
    }
    const float mean_g = warp_sum(sum_g) / n, mean_gh = warp_sum(sum_gh) / n;
    for (int64_t i = lane; i < n; i += kWarp) {
      const float g = to_float(d[i]) * to_float(weight[i]), h = (to_float(in[i]) - m) * r;
      dx[row * n + i] = from_float<T>((g - mean_g - h * mean_gh) * r);
    }
  }
}

// Each warp of a block sums other rows of its columns.
struct ColumnSums {
  float values[2][kRowLanes][kColumnsPerBlock];
};

// partial: (gridDim.y, 2, n)
template <class T>
__global__ void layer_norm_column_sums_kernel(float* partial, const T* dout, const T* x, const float* mean,
                                              const float* rstd, int64_t rows, int64_t n, int64_t dout_stride,
                                              int64_t x_stride) {
  ColumnSums& shared = *reinterpret_cast<ColumnSums*>(dynamic_shared());
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnsPerBlock + threadIdx.x;
  float dweight = 0.0f, dbias = 0.0f;
  if (column < n) {
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kRowLanes + threadIdx.y; row < rows;
         row += static_cast<int64_t>(gridDim.y) * kRowLanes) {
      const float d = to_float(dout[row * dout_stride + column]);
      dweight += d * (to_float(x[row * x_stride + column]) - mean[row]) * rstd[row];
      dbias += d;
    }
  }
  store_shared(&shared.values[0][threadIdx.y][threadIdx.x], dweight);
  store_shared(&shared.values[1][threadIdx.y][threadIdx.x], dbias);
  __syncthreads();
  if (threadIdx.y < 2 && column < n) {
    float sum = 0.0f;
    for (int i = 0; i < kRowLanes; ++i) sum += load_shared(&shared.values[threadIdx.y][i][threadIdx.x]);
    partial[(static_cast<int64_t>(blockIdx.y) * 2 + threadIdx.y) * n + column] = sum;
  }
}

template <class W>
__global__ void layer_norm_add_parts_kernel(W* dweight, W* dbias, const float* partial, int parts, int64_t n) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (column >= n) return;
  float sums[2] = {0.0f, 0.0f};
  for (int64_t part = 0; part < parts; ++part)
    for (int which = 0; which < 2; ++which) sums[which] += partial[(part * 2 + which) * n + column];
  dweight[column] = from_float<W>(sums[0]);
  dbias[column] = from_float<W>(sums[1]);
}

template <class T, class W>
cudaError_t layer_norm_forward(void* out, float* mean, float* rstd, const void* x, const void* weight, const void* bias,
                               int64_t rows, int64_t n, int64_t x_stride, float eps, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return launch(layer_norm_forward_kernel<T, W>, blocks_for(rows, kRowsPerBlock, 65535), kRowsPerBlock * kWarp, 0,
                stream, static_cast<T*>(out), mean, rstd, static_cast<const T*>(x), static_cast<const W*>(weight),
                static_cast<const W*>(bias), rows, n, x_stride, eps);
}

// partial: (parts, 2, n) float32, parts from 1 to 65,535.
template <class T, class W>
cudaError_t layer_norm_backward(void* dx, void* dweight, void* dbias, float* partial, const void* dout, const void* x,
                                const void* weight, const float* mean, const float* rstd, int64_t rows, int64_t n,
                                int64_t dout_stride, int64_t x_stride, int parts, cudaStream_t stream) {
  const T *d = static_cast<const T*>(dout), *in = static_cast<const T*>(x);
  cudaError_t error = cudaSuccess;
  if (rows > 0)
    error = launch(layer_norm_backward_kernel<T, W>, blocks_for(rows, kRowsPerBlock, 65535), kRowsPerBlock * kWarp, 0,
                   stream, static_cast<T*>(dx), d, in, static_cast<const W*>(weight), mean, rstd, rows, n, dout_stride,
                   x_stride);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>((n + kColumnsPerBlock - 1) / kColumnsPerBlock), static_cast<unsigned>(parts));
  error = launch(layer_norm_column_sums_kernel<T>, grid, dim3(kColumnsPerBlock, kRowLanes), sizeof(ColumnSums), stream,
                 partial, d, in, mean, rstd, rows, n, dout_stride, x_stride);
  if (error != cudaSuccess) return error;
  return launch(layer_norm_add_parts_kernel<W>, static_cast<unsigned>((n + 255) / 256), 256, 0, stream,
                static_cast<W*>(dweight), static_cast<W*>(dbias), static_cast<const float*>(partial), parts, n);
}

}  // namespace cuda
}  // namespace fastgpt
