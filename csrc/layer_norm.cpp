// Bindings of kernels/cpu/layer_norm.h.
#include <memory>

#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

void layer_norm_forward(Address out, Address mean, Address rstd, Address x, Address weight, Address bias, int64_t rows,
                        int64_t n, int64_t x_stride, float eps, int dtype_code, int weight_dtype_code,
                        int num_threads) {
  const char* what = "layer_norm_forward";
  const DType dtype = to_dtype(dtype_code, what), weight_dtype = to_dtype(weight_dtype_code, what);
  require(dtype == DType::kBFloat16 || weight_dtype == DType::kFloat32, "layer_norm: bfloat16 weight for float32 x");
  check_sizes({rows, n}, what);
  check_sizes({rows, x_stride}, what);
  const int64_t size = dtype_size(dtype), weight_size = dtype_size(weight_dtype);
  const LayerNormForwardArgs args = {pointer(out, rows * n, size, what),
                                     float_pointer(mean, rows, what),
                                     float_pointer(rstd, rows, what),
                                     pointer(x, rows * n, size, what),
                                     pointer(weight, n, weight_size, what),
                                     pointer(bias, n, weight_size, what),
                                     rows,
                                     n,
                                     x_stride,
                                     eps,
                                     dtype,
                                     weight_dtype,
                                     check_threads(num_threads)};
  if (n == 0) return;
  pybind11::gil_scoped_release release;
  kernels().layer_norm_forward(args);
}

void layer_norm_backward(Address dx, Address dweight, Address dbias, Address dout, Address x, Address weight,
                         Address mean, Address rstd, int64_t rows, int64_t n, int64_t dout_stride, int64_t x_stride,
                         int dtype_code, int weight_dtype_code, int num_threads) {
  const char* what = "layer_norm_backward";
  const DType dtype = to_dtype(dtype_code, what), weight_dtype = to_dtype(weight_dtype_code, what);
  require(dtype == DType::kBFloat16 || weight_dtype == DType::kFloat32, "layer_norm: bfloat16 weight for float32 x");
  check_sizes({rows, n}, what);
  check_sizes({rows, x_stride}, what);
  check_sizes({rows, dout_stride}, what);
  check_sizes({check_threads(num_threads), 4, n}, what);
  const int64_t size = dtype_size(dtype), weight_size = dtype_size(weight_dtype);
  if (n == 0) return;
  const std::unique_ptr<float[]> partial(new float[4 * n * num_threads]);
  const LayerNormBackwardArgs args = {pointer(dx, rows * n, size, what),
                                      pointer(dweight, n, weight_size, what),
                                      pointer(dbias, n, weight_size, what),
                                      pointer(dout, rows * n, size, what),
                                      pointer(x, rows * n, size, what),
                                      pointer(weight, n, weight_size, what),
                                      float_pointer(mean, rows, what),
                                      float_pointer(rstd, rows, what),
                                      partial.get(),
                                      rows,
                                      n,
                                      dout_stride,
                                      x_stride,
                                      dtype,
                                      weight_dtype,
                                      num_threads};
  pybind11::gil_scoped_release release;
  kernels().layer_norm_backward(args);
}

}  // namespace

void bind_layer_norm(pybind11::module_& module) {
  module.def("layer_norm_forward", &layer_norm_forward);
  module.def("layer_norm_backward", &layer_norm_backward);
}

}  // namespace fastgpt
