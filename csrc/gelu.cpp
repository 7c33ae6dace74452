// Bindings of kernels/cpu/gelu.h.
#include <memory>

#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

// bias is a null pointer where there is none; then rows and n need only have the right product.
void gelu_forward(Address out, Address x, Address bias, int64_t rows, int64_t n, int dtype_code, int bias_dtype_code,
                  int num_threads) {
  const char* what = "gelu_forward";
  const DType dtype = to_dtype(dtype_code, what), bias_dtype = to_dtype(bias_dtype_code, what);
  require(dtype == DType::kBFloat16 || bias_dtype == DType::kFloat32, "gelu: bfloat16 bias for float32 x");
  check_sizes({rows, n}, what);
  const int64_t size = dtype_size(dtype);
  const GeluForwardArgs args = {pointer(out, rows * n, size, what),
                                pointer(x, rows * n, size, what),
                                pointer(bias, 0, dtype_size(bias_dtype), what),
                                rows,
                                n,
                                dtype,
                                bias_dtype,
                                check_threads(num_threads)};
  pybind11::gil_scoped_release release;
  kernels().gelu_forward(args);
}

void gelu_backward(Address dx, Address dbias, Address dout, Address x, Address bias, int64_t rows, int64_t n,
                   int dtype_code, int bias_dtype_code, int num_threads) {
  const char* what = "gelu_backward";
  const DType dtype = to_dtype(dtype_code, what), bias_dtype = to_dtype(bias_dtype_code, what);
  require(dtype == DType::kBFloat16 || bias_dtype == DType::kFloat32, "gelu: bfloat16 bias for float32 x");
  check_sizes({rows, n}, what);
  check_sizes({check_threads(num_threads), 2, n}, what);
  const int64_t size = dtype_size(dtype), bias_size = dtype_size(bias_dtype);
  const std::unique_ptr<float[]> partial(bias ? new float[2 * n * num_threads] : nullptr);
  const GeluBackwardArgs args = {pointer(dx, rows * n, size, what),
                                 pointer(dbias, bias ? n : 0, bias_size, what),
                                 pointer(dout, rows * n, size, what),
                                 pointer(x, rows * n, size, what),
                                 pointer(bias, 0, bias_size, what),
                                 partial.get(),
                                 rows,
                                 n,
                                 dtype,
                                 bias_dtype,
                                 num_threads};
  pybind11::gil_scoped_release release;
  kernels().gelu_backward(args);
}

}  // namespace

void bind_gelu(pybind11::module_& module) {
  module.def("gelu_forward", &gelu_forward);
  module.def("gelu_backward", &gelu_backward);
}

}  // namespace fastgpt
