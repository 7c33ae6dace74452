// Bindings of kernels/cpu/dropout_add_layer_norm.h.
#include <memory>

#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

// One buffer for all threads: the factors of a row each, and `sums` floats each behind them.
std::unique_ptr<float[]> workspace(int64_t n, int64_t sums, int num_threads, const char* what) {
  check_sizes({check_threads(num_threads), 8, n}, what);
  return std::unique_ptr<float[]>(new float[num_threads * (kernels().dropout_row_floats(n) + sums)]);
}

void dropout_add_layer_norm_forward(Address total, Address normed, Address mean, Address rstd, Address x,
                                    Address residual, Address weight, Address bias, int64_t rows, int64_t n,
                                    int64_t x_stride, int64_t residual_stride, float eps, uint64_t seed,
                                    int32_t dropout_threshold, int dtype_code, int weight_dtype_code, int num_threads) {
  const char* what = "dropout_add_layer_norm_forward";
  const DType dtype = to_dtype(dtype_code, what), weight_dtype = to_dtype(weight_dtype_code, what);
  require(dtype == DType::kBFloat16 || weight_dtype == DType::kFloat32, "bfloat16 weight for float32 x");
  check_sizes({rows, n}, what);
  check_sizes({rows, x_stride}, what);
  check_sizes({rows, residual_stride}, what);
  if (n == 0) return;
  const std::unique_ptr<float[]> factors = workspace(n, 0, num_threads, what);
  const int64_t size = dtype_size(dtype), weight_size = dtype_size(weight_dtype);
  const DropoutAddLayerNormForwardArgs args = {pointer(total, rows * n, size, what),
                                               pointer(normed, rows * n, size, what),
                                               float_pointer(mean, rows, what),
                                               float_pointer(rstd, rows, what),
                                               pointer(x, rows * n, size, what),
                                               pointer(residual, rows * n, size, what),
                                               pointer(weight, n, weight_size, what),
                                               pointer(bias, n, weight_size, what),
                                               factors.get(),
                                               rows,
                                               n,
                                               x_stride,
                                               residual_stride,
                                               eps,
                                               seed,
                                               check_threshold(dropout_threshold, what),
                                               dtype,
                                               weight_dtype,
                                               num_threads};
  pybind11::gil_scoped_release release;
  kernels().dropout_add_layer_norm_forward(args);
}

// dtotal is a null pointer where nothing used the total, dx where there is no dropout.
void dropout_add_layer_norm_backward(Address dx, Address dresidual, Address dweight, Address dbias, Address dtotal,
                                     Address dnormed, Address total, Address weight, Address mean, Address rstd,
                                     int64_t rows, int64_t n, int64_t dtotal_stride, int64_t dnormed_stride,
                                     uint64_t seed, int32_t dropout_threshold, int dtype_code, int weight_dtype_code,
                                     int num_threads) {
  const char* what = "dropout_add_layer_norm_backward";
  const DType dtype = to_dtype(dtype_code, what), weight_dtype = to_dtype(weight_dtype_code, what);
  require(dtype == DType::kBFloat16 || weight_dtype == DType::kFloat32, "bfloat16 weight for float32 x");
  check_sizes({rows, n}, what);
  check_sizes({rows, dtotal_stride}, what);
  check_sizes({rows, dnormed_stride}, what);
  if (n == 0) return;
  const std::unique_ptr<float[]> floats = workspace(n, 4 * n, num_threads, what);
  const int64_t size = dtype_size(dtype), weight_size = dtype_size(weight_dtype);
  const DropoutAddLayerNormBackwardArgs args = {
      pointer(dx, check_threshold(dropout_threshold, what) ? rows * n : 0, size, what),
      pointer(dresidual, rows * n, size, what),
      pointer(dweight, n, weight_size, what),
      pointer(dbias, n, weight_size, what),
      pointer(dtotal, 0, size, what),
      pointer(dnormed, rows * n, size, what),
      pointer(total, rows * n, size, what),
      pointer(weight, n, weight_size, what),
      float_pointer(mean, rows, what),
      float_pointer(rstd, rows, what),
      floats.get() + num_threads * kernels().dropout_row_floats(n),
      floats.get(),
      rows,
      n,
      dtotal_stride,
      dnormed_stride,
      seed,
      dropout_threshold,
      dtype,
      weight_dtype,
      num_threads};
  pybind11::gil_scoped_release release;
  kernels().dropout_add_layer_norm_backward(args);
}

}  // namespace

void bind_dropout_add_layer_norm(pybind11::module_& module) {
  module.def("dropout_add_layer_norm_forward", &dropout_add_layer_norm_forward);
  module.def("dropout_add_layer_norm_backward", &dropout_add_layer_norm_backward);
}

}  // namespace fastgpt
