// Launches of kernels/cuda/layer_norm.cuh by dtype.
#include "../kernels/cuda/layer_norm.cuh"
#include "cuda_launch.h"

namespace fastgpt {
namespace cuda {
namespace {

// Calls launch(T{}, W{}) with the element types of x and of the weight, which is that of x or float32.
template <class Launch>
int with_types(DType dtype, DType weight_dtype, Launch launch) {
  const bool wide = weight_dtype == DType::kFloat32;
  if (!wide && weight_dtype != dtype) return cudaErrorInvalidValue;
  switch (dtype) {
    case DType::kFloat32: return launch(float{}, float{});
    case DType::kBFloat16: return wide ? launch(__nv_bfloat16{}, float{}) : launch(__nv_bfloat16{}, __nv_bfloat16{});
    case DType::kFloat16: return wide ? launch(__half{}, float{}) : launch(__half{}, __half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int layer_norm_forward(void* out, float* mean, float* rstd, const void* x, const void* weight, const void* bias,
                       int64_t rows, int64_t n, int64_t x_stride, float eps, DType dtype, DType weight_dtype,
                       void* stream) {
  return with_types(dtype, weight_dtype, [&](auto t, auto w) -> int {
    return layer_norm_forward<decltype(t), decltype(w)>(out, mean, rstd, x, weight, bias, rows, n, x_stride, eps,
                                                        static_cast<cudaStream_t>(stream));
  });
}

int layer_norm_backward(void* dx, void* dweight, void* dbias, float* partial, const void* dout, const void* x,
                        const void* weight, const float* mean, const float* rstd, int64_t rows, int64_t n,
                        int64_t dout_stride, int64_t x_stride, int parts, DType dtype, DType weight_dtype,
                        void* stream) {
  return with_types(dtype, weight_dtype, [&](auto t, auto w) -> int {
    return layer_norm_backward<decltype(t), decltype(w)>(dx, dweight, dbias, partial, dout, x, weight, mean, rstd, rows,
                                                         n, dout_stride, x_stride, parts,
                                                         static_cast<cudaStream_t>(stream));
  });
}

}  // namespace cuda
}  // namespace fastgpt
