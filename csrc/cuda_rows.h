// Kernels on aligned rows: what the bindings give and rows_cuda.cu runs. No CUDA header.
#pragma once

#include "cuda_launch.h"

namespace fastgpt {
namespace cuda {

// n is a multiple of 8, rows begin at multiples of 16 bytes, `out`-like tensors are contiguous.
struct RowsCall {
  int64_t rows, n;
  int parts;  // of `partial`, each the sums of some rows
  uint64_t seed;
  uint32_t dropout_threshold;  // 0 .. 65536
  DType dtype, weight_dtype;   // the weight's is that of x or float32
  void* stream;
};

constexpr int64_t kMostNormed = 2048;

// total and residual are null for a plain norm.
int row_norm_forward(void* out, void* total, float* mean, float* rstd, const void* x, const void* residual,
                     const void* weight, const void* bias, int64_t x_stride, int64_t residual_stride, float eps,
                     const RowsCall& call);
// dx is null without dropout; dtotal may be null. partial: (parts, 2, n) float32.
int row_norm_backward(void* dx, void* dresidual, void* dweight, void* dbias, float* partial, const void* dtotal,
                      const void* dout, const void* total, const void* weight, const float* mean, const float* rstd,
                      int64_t dtotal_stride, int64_t dout_stride, int64_t total_stride, const RowsCall& call);
int bias_gelu_forward(void* out, const void* x, const void* bias, const RowsCall& call);
// partial: (parts, n) float32.
int bias_gelu_backward(void* dx, void* dbias, float* partial, const void* dout, const void* x, const void* bias,
                       const RowsCall& call);

}  // namespace cuda
}  // namespace fastgpt
