// What the bindings call and the .cu files define: no CUDA header, so that the bindings compile with any C++ compiler.
// Every function returns a cudaError_t as int; 0 is success.
#pragma once

#include <cstdint>

namespace fastgpt {
namespace cuda {

// As in fastgpt/ops/extension.py.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

const char* error_text(int error);

int gelu_forward(void* out, const void* x, int64_t n, DType dtype, void* stream);
int gelu_backward(void* dx, const void* dout, const void* x, int64_t n, DType dtype, void* stream);

int layer_norm_forward(void* out, float* mean, float* rstd, const void* x, const void* weight, const void* bias,
                       int64_t rows, int64_t n, int64_t x_stride, float eps, DType dtype, DType weight_dtype,
                       void* stream);
int layer_norm_backward(void* dx, void* dweight, void* dbias, float* partial, const void* dout, const void* x,
                        const void* weight, const float* mean, const float* rstd, int64_t rows, int64_t n,
                        int64_t dout_stride, int64_t x_stride, int parts, DType dtype, DType weight_dtype,
                        void* stream);

}  // namespace cuda
}  // namespace fastgpt
