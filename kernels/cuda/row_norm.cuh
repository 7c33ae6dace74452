// Layer normalisation of rows that stay in registers, with dropout and the residual sum before it where wanted.
//
//   total = residual + dropout(x)    (or total = x)    out = (total - mean) rstd weight + bias
//   h = (total - mean) rstd,  g = dout weight,  d = rstd (g - mean(g) - h mean(g h)) + dtotal
//   dresidual = d,  dx = dropout'(d),  dweight = sum of dout h,  dbias = sum of dout     over the rows
//
// Work: forward a warp a row, all loads of 16 bytes, each tensor read once; the variance is taken about the mean from
// registers. Backward a block of 128 threads a row, so that a thread keeps its columns and their sums dweight and dbias
// from row to row; the grid is fixed, each block leaves its sums in `partial`, and add_parts_kernel adds them in order.
// Bytes for n elements of T: forward 2 (3 reads, 2 writes with the sum: 5), backward 3 to 5. Rows whose length is no
// multiple of 8, not aligned or over 2,048 go by layer_norm.cuh. Paper: Ba, Kiros, Hinton, "Layer Normalization", 2016.
#pragma once

#include "rows.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kMostRow = 2048;

template <class T, class W>
struct RowNormForward {
  T *out, *total;  // total is null where there is no residual
  float *mean, *rstd;
  const T *x, *residual;
  const W *weight, *bias;
  int64_t rows, x_stride, residual_stride;
  int n;
  float eps;
  Dropout dropout;
};

template <class T, class W, int kGroups>
__global__ void __launch_bounds__(kRowsThreads) row_norm_forward_kernel(RowNormForward<T, W> a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kRowsThreads / kWarp);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (kRowsThreads / kWarp) + threadIdx.x / kWarp; row < a.rows;
       row += step) {
    float v[kGroups][kGroup] = {};
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int column = (i * kWarp + lane) * kGroup;
      if (column < a.n) load_group(v[i], a.x + row * a.x_stride + column);
    }
    if (a.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int column = (i * kWarp + lane) * kGroup;
        if (a.dropout.threshold != 0) drop_group(v[i], keep_group(a.dropout, row, column / kGroup), a.dropout.scale);
        if (column >= a.n) continue;
        float residual[kGroup];
        load_group(residual, a.residual + row * a.residual_stride + column);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) v[i][j] += residual[j];
        store_group(a.total + row * a.n + column, v[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < kGroup; ++j) sum += v[i][j];
    const float mean = warp_sum(sum) / a.n;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if ((i * kWarp + lane) * kGroup >= a.n) continue;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) squares += (v[i][j] - mean) * (v[i][j] - mean);
    }
    const float rstd = 1.0f / sqrtf(warp_sum(squares) / a.n + a.eps);
    if (lane == 0) {
      a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int column = (i * kWarp + lane) * kGroup;
      if (column >= a.n) continue;
      float weight[kGroup], bias[kGroup];
      load_group(weight, a.weight + column);
      load_group(bias, a.bias + column);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) v[i][j] = (v[i][j] - mean) * rstd * weight[j] + bias[j];
      store_group(a.out + row * a.n + column, v[i]);
    }
  }
}

template <class T, class W>
struct RowNormBackward {
  T *dx, *dresidual;               // dx is null without dropout
  float* partial;                  // (gridDim.x, 2, n)
  const T *dtotal, *dout, *total;  // dtotal may be null
  const W* weight;
  const float *mean, *rstd;
  int64_t rows, dtotal_stride, dout_stride, total_stride;
  int n;
  Dropout dropout;
};

// The sums of two numbers over the block. shared: (2, 4) pieces of 16 bytes; `turn` alternates, so one barrier is
// enough.
__device__ inline void block_sums(float& a, float& b, Pack<float>* shared, int turn) {
  constexpr int kWarps = kRowsThreads / kWarp;
  a = warp_sum(a);
  b = warp_sum(b);
  if (threadIdx.x % kWarp == 0) store_shared(shared + turn * kWarps + threadIdx.x / kWarp, Pack<float>{{a, b, 0, 0}});
  __syncthreads();
  a = b = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const Pack<float> part = load_shared(shared + turn * kWarps + i);
    a += part.values[0];
    b += part.values[1];
  }
}

// Left to itself ptxas aims at 64 registers on sm_90a, and spills one.
template <class T, class W, int kGroups>
__global__ void __launch_bounds__(kRowsThreads, kGroups == 1 ? 6 : 4)
    row_norm_backward_kernel(RowNormBackward<T, W> a) {
  Pack<float>* shared = reinterpret_cast<Pack<float>*>(dynamic_shared());
  float dweight[kGroups][kGroup] = {}, dbias[kGroups][kGroup] = {};
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
    float h[kGroups][kGroup] = {}, g[kGroups][kGroup] = {};
    const float mean = a.mean[row], rstd = a.rstd[row];
    float sum_g = 0.0f, sum_gh = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int column = (i * kRowsThreads + static_cast<int>(threadIdx.x)) * kGroup;
      if (column >= a.n) continue;
      float weight[kGroup];
      load_group(h[i], a.total + row * a.total_stride + column);
      load_group(g[i], a.dout + row * a.dout_stride + column);
      load_group(weight, a.weight + column);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        h[i][j] = (h[i][j] - mean) * rstd;
        dweight[i][j] += g[i][j] * h[i][j];
        dbias[i][j] += g[i][j];
        g[i][j] *= weight[j];
        sum_g += g[i][j];
        sum_gh += g[i][j] * h[i][j];
      }
    }
    block_sums(sum_g, sum_gh, shared, turn);
    const float mean_g = sum_g / a.n, mean_gh = sum_gh / a.n;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = i * kRowsThreads + static_cast<int>(threadIdx.x), column = group * kGroup;
      const uint32_t keep = a.dx == nullptr ? 0 : keep_group(a.dropout, row, group);
      if (column >= a.n) continue;
      float dtotal[kGroup] = {};
      if (a.dtotal != nullptr) load_group(dtotal, a.dtotal + row * a.dtotal_stride + column);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) g[i][j] = (g[i][j] - mean_g - h[i][j] * mean_gh) * rstd + dtotal[j];
      if (a.dx != nullptr) {
        float dropped[kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) dropped[j] = g[i][j];
        drop_group(dropped, keep, a.dropout.scale);
        store_group(a.dx + row * a.n + column, dropped);
      }
      store_group(a.dresidual + row * a.n + column, g[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int column = (i * kRowsThreads + static_cast<int>(threadIdx.x)) * kGroup;
    if (column >= a.n) continue;
    float* to = a.partial + static_cast<int64_t>(blockIdx.x) * 2 * a.n + column;
    store_group(to, dweight[i]);
    store_group(to + a.n, dbias[i]);
  }
}

template <class T, class W>
cudaError_t row_norm_forward(const RowNormForward<T, W>& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const auto kernel = a.n <= 1024 ? row_norm_forward_kernel<T, W, 4> : row_norm_forward_kernel<T, W, 8>;
  return launch(kernel, blocks_for(a.rows, kRowsThreads / kWarp, 65535), kRowsThreads, 0, stream, a);
}

// partial: (parts, 2, n) float32.
template <class T, class W>
cudaError_t row_norm_backward(W* dweight, W* dbias, const RowNormBackward<T, W>& a, int parts, cudaStream_t stream) {
  const auto kernel = a.n <= 1024 ? row_norm_backward_kernel<T, W, 1> : row_norm_backward_kernel<T, W, 2>;
  const cudaError_t error = launch(kernel, static_cast<unsigned>(parts), kRowsThreads,
                                   2 * kRowsThreads / kWarp * sizeof(Pack<float>), stream, a);
  if (error != cudaSuccess) return error;
  return add_parts(dweight, dbias, static_cast<const float*>(a.partial), parts, 2, a.n, stream);
}

}  // namespace cuda
}  // namespace fastgpt
