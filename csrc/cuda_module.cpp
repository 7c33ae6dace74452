// fastgpt._cuda: the CUDA kernels. It links no PyTorch: tensors come as addresses, the stream as torch's raw handle.
#include <pybind11/pybind11.h>

#include <string>

#include "checks.h"
#include "cuda_launch.h"

namespace fastgpt {
namespace {

cuda::DType to_cuda_dtype(int code, const char* what) {
  require(code >= 0 && code <= 2, std::string(what) + ": unknown dtype code " + std::to_string(code));
  return static_cast<cuda::DType>(code);
}

int64_t size_of(cuda::DType dtype) { return dtype == cuda::DType::kFloat32 ? 4 : 2; }

// A launch error as an exception that names the op.
void check_launch(int error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string(what) + ": CUDA says: " + cuda::error_text(error));
}

void* to_stream(Address stream) { return reinterpret_cast<void*>(stream); }

void gelu_forward(Address out, Address x, int64_t n, int dtype_code, Address stream) {
  const char* what = "gelu_forward";
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what);
  check_sizes({n}, what);
  const int64_t size = size_of(dtype);
  check_launch(cuda::gelu_forward(pointer(out, n, size, what), pointer(x, n, size, what), n, dtype, to_stream(stream)),
               what);
}

void gelu_backward(Address dx, Address dout, Address x, int64_t n, int dtype_code, Address stream) {
  const char* what = "gelu_backward";
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what);
  check_sizes({n}, what);
  const int64_t size = size_of(dtype);
  check_launch(cuda::gelu_backward(pointer(dx, n, size, what), pointer(dout, n, size, what), pointer(x, n, size, what),
                                   n, dtype, to_stream(stream)),
               what);
}

void layer_norm_forward(Address out, Address mean, Address rstd, Address x, Address weight, Address bias, int64_t rows,
                        int64_t n, int64_t x_stride, float eps, int dtype_code, int weight_dtype_code, Address stream) {
  const char* what = "layer_norm_forward";
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what), weight_dtype = to_cuda_dtype(weight_dtype_code, what);
  check_sizes({rows, n}, what);
  check_sizes({rows, x_stride}, what);
  if (n == 0) return;
  const int64_t size = size_of(dtype), weight_size = size_of(weight_dtype);
  check_launch(cuda::layer_norm_forward(pointer(out, rows * n, size, what), float_pointer(mean, rows, what),
                                        float_pointer(rstd, rows, what), pointer(x, rows * n, size, what),
                                        pointer(weight, n, weight_size, what), pointer(bias, n, weight_size, what),
                                        rows, n, x_stride, eps, dtype, weight_dtype, to_stream(stream)),
               what);
}

void layer_norm_backward(Address dx, Address dweight, Address dbias, Address partial, Address dout, Address x,
                         Address weight, Address mean, Address rstd, int64_t rows, int64_t n, int64_t dout_stride,
                         int64_t x_stride, int parts, int dtype_code, int weight_dtype_code, Address stream) {
  const char* what = "layer_norm_backward";
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what), weight_dtype = to_cuda_dtype(weight_dtype_code, what);
  require(parts >= 1 && parts <= 65535, "layer_norm_backward: parts must be from 1 to 65535");
  check_sizes({rows, n}, what);
  check_sizes({rows, x_stride}, what);
  check_sizes({rows, dout_stride}, what);
  check_sizes({parts, 2, n}, what);
  if (n == 0) return;
  const int64_t size = size_of(dtype), weight_size = size_of(weight_dtype);
  check_launch(cuda::layer_norm_backward(pointer(dx, rows * n, size, what), pointer(dweight, n, weight_size, what),
                                         pointer(dbias, n, weight_size, what), float_pointer(partial, parts * n, what),
                                         pointer(dout, rows * n, size, what), pointer(x, rows * n, size, what),
                                         pointer(weight, n, weight_size, what), float_pointer(mean, rows, what),
                                         float_pointer(rstd, rows, what), rows, n, dout_stride, x_stride, parts, dtype,
                                         weight_dtype, to_stream(stream)),
               what);
}

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of fastgpt. Use fastgpt.ops: it checks shapes, dtypes, devices and lifetimes.";
  module.def("gelu_forward", &fastgpt::gelu_forward);
  module.def("gelu_backward", &fastgpt::gelu_backward);
  module.def("layer_norm_forward", &fastgpt::layer_norm_forward);
  module.def("layer_norm_backward", &fastgpt::layer_norm_backward);
}
