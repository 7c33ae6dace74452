// Launches of kernels/cuda/row_norm.cuh and bias_gelu.cuh by dtype.
#include "../kernels/cuda/bias_gelu.cuh"
#include "../kernels/cuda/row_norm.cuh"
#include "cuda_rows.h"

namespace fastgpt {
namespace cuda {
namespace {

// Calls launch(T{}, W{}) with the element types of x and of the weight.
template <class Launch>
int with_types(const RowsCall& call, Launch launch) {
  const bool wide = call.weight_dtype == DType::kFloat32;
  if (!wide && call.weight_dtype != call.dtype) return cudaErrorInvalidValue;
  switch (call.dtype) {
    case DType::kFloat32: return launch(float{}, float{});
    case DType::kBFloat16: return wide ? launch(__nv_bfloat16{}, float{}) : launch(__nv_bfloat16{}, __nv_bfloat16{});
    case DType::kFloat16: return wide ? launch(__half{}, float{}) : launch(__half{}, __half{});
  }
  return cudaErrorInvalidValue;
}

Dropout dropout_of(const RowsCall& call) { return {call.seed, call.dropout_threshold}; }

}  // namespace

int row_norm_forward(void* out, void* total, float* mean, float* rstd, const void* x, const void* residual,
                     const void* weight, const void* bias, int64_t x_stride, int64_t residual_stride, float eps,
                     const RowsCall& call) {
  return with_types(call, [&](auto t, auto w) -> int {
    using T = decltype(t);
    using W = decltype(w);
    const RowNormForward<T, W> a = {static_cast<T*>(out),
                                    static_cast<T*>(total),
                                    mean,
                                    rstd,
                                    static_cast<const T*>(x),
                                    static_cast<const T*>(residual),
                                    static_cast<const W*>(weight),
                                    static_cast<const W*>(bias),
                                    call.rows,
                                    x_stride,
                                    residual_stride,
                                    static_cast<int>(call.n),
                                    eps,
                                    dropout_of(call)};
    return row_norm_forward(a, static_cast<cudaStream_t>(call.stream));
  });
}

int row_norm_backward(void* dx, void* dresidual, void* dweight, void* dbias, float* partial, const void* dtotal,
                      const void* dout, const void* total, const void* weight, const float* mean, const float* rstd,
                      int64_t dtotal_stride, int64_t dout_stride, int64_t total_stride, const RowsCall& call) {
  return with_types(call, [&](auto t, auto w) -> int {
    using T = decltype(t);
    using W = decltype(w);
    const RowNormBackward<T, W> a = {static_cast<T*>(dx),
                                     static_cast<T*>(dresidual),
                                     partial,
                                     static_cast<const T*>(dtotal),
                                     static_cast<const T*>(dout),
                                     static_cast<const T*>(total),
                                     static_cast<const W*>(weight),
                                     mean,
                                     rstd,
                                     call.rows,
                                     dtotal_stride,
                                     dout_stride,
                                     total_stride,
                                     static_cast<int>(call.n),
                                     dropout_of(call)};
    return row_norm_backward(static_cast<W*>(dweight), static_cast<W*>(dbias), a, call.parts,
                             static_cast<cudaStream_t>(call.stream));
  });
}

int bias_gelu_forward(void* out, const void* x, const void* bias, const RowsCall& call) {
  return with_types(call, [&](auto t, auto w) -> int {
    using T = decltype(t);
    return bias_gelu_forward(static_cast<T*>(out), static_cast<const T*>(x), static_cast<const decltype(w)*>(bias),
                             call.rows, static_cast<int>(call.n), call.parts, static_cast<cudaStream_t>(call.stream));
  });
}

int bias_gelu_backward(void* dx, void* dbias, float* partial, const void* dout, const void* x, const void* bias,
                       const RowsCall& call) {
  return with_types(call, [&](auto t, auto w) -> int {
    using T = decltype(t);
    using W = decltype(w);
    return bias_gelu_backward(static_cast<T*>(dx), static_cast<W*>(dbias), partial, static_cast<const T*>(dout),
                              static_cast<const T*>(x), static_cast<const W*>(bias), call.rows,
                              static_cast<int>(call.n), call.parts, static_cast<cudaStream_t>(call.stream));
  });
}

}  // namespace cuda
}  // namespace fastgpt
