// Launches of kernels/cuda/gelu.cuh by dtype.
#include "../kernels/cuda/gelu.cuh"
#include "cuda_launch.h"

namespace fastgpt {
namespace cuda {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int gelu_forward(void* out, const void* x, int64_t n, DType dtype, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32: return gelu_forward<float>(out, x, n, s);
    case DType::kBFloat16: return gelu_forward<__nv_bfloat16>(out, x, n, s);
    case DType::kFloat16: return gelu_forward<__half>(out, x, n, s);
  }
  return cudaErrorInvalidValue;
}

int gelu_backward(void* dx, const void* dout, const void* x, int64_t n, DType dtype, void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DType::kFloat32: return gelu_backward<float>(dx, dout, x, n, s);
    case DType::kBFloat16: return gelu_backward<__nv_bfloat16>(dx, dout, x, n, s);
    case DType::kFloat16: return gelu_backward<__half>(dx, dout, x, n, s);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastgpt
