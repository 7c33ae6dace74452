// Bindings of kernels/cpu/gelu.h.
#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

void gelu_forward(Address out, Address x, int64_t n, int dtype_code, int num_threads) {
  const char* what = "gelu_forward";
  const DType dtype = to_dtype(dtype_code, what);
  check_sizes({n}, what);
  const int64_t size = dtype_size(dtype);
  const GeluForwardArgs args = {pointer(out, n, size, what), pointer(x, n, size, what), n, dtype,
                                check_threads(num_threads)};
  pybind11::gil_scoped_release release;
  kernels().gelu_forward(args);
}

void gelu_backward(Address dx, Address dout, Address x, int64_t n, int dtype_code, int num_threads) {
  const char* what = "gelu_backward";
  const DType dtype = to_dtype(dtype_code, what);
  check_sizes({n}, what);
  const int64_t size = dtype_size(dtype);
  const GeluBackwardArgs args = {
      pointer(dx, n, size, what), pointer(dout, n, size, what), pointer(x, n, size, what), n, dtype,
      check_threads(num_threads)};
  pybind11::gil_scoped_release release;
  kernels().gelu_backward(args);
}

}  // namespace

void bind_gelu(pybind11::module_& module) {
  module.def("gelu_forward", &gelu_forward);
  module.def("gelu_backward", &gelu_backward);
}

}  // namespace fastgpt
