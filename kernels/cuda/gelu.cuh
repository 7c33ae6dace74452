// GELU, tanh form; the formulas stand in kernels/cpu/gelu.h.
//
// Work: a thread takes 16 bytes at a time and strides over the grid; the tail, and tensors that are not aligned to 16
// bytes, go element by element. Bytes: forward one read and one write, backward two reads and one write.
// Paper: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.
#pragma once

#include "common.cuh"

namespace fastgpt {
namespace cuda {

constexpr float kTwoSqrt2OverPi = 1.5957691216f;
constexpr float kGeluCubic = 0.044715f;

__device__ inline float gelu(float x) {
  const float s = 1.0f / (1.0f + __expf(-x * kTwoSqrt2OverPi * (1.0f + kGeluCubic * x * x)));
  // For x = -inf the product would be -inf * 0; the limit is 0.
  return x == -INFINITY ? 0.0f : x * s;
}

__device__ inline float gelu_derivative(float x) {
  // Beyond |x| = 10 the second term is below 1e-30; clamping keeps x^3 from overflowing there.
  const float t = fminf(fmaxf(x, -10.0f), 10.0f);
  const float e = __expf(-t * kTwoSqrt2OverPi * (1.0f + kGeluCubic * t * t));
  const float s = 1.0f / (1.0f + e);
  const float slope = s + t * s * (e * s) * kTwoSqrt2OverPi * (1.0f + 3.0f * kGeluCubic * t * t);
  // At t = -10 e overflows and e * s would be inf * 0. fmaxf and fminf drop NaN, so it is put back.
  return isnan(x) ? x : (x <= -10.0f ? 0.0f : slope);
}

template <class T>
__global__ void gelu_forward_kernel(T* out, const T* x, int64_t n, int64_t packs) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < packs; i += step) {
    Pack<T> p = reinterpret_cast<const Pack<T>*>(x)[i];
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) p.values[j] = from_float<T>(gelu(to_float(p.values[j])));
    reinterpret_cast<Pack<T>*>(out)[i] = p;
  }
  for (int64_t i = packs * Pack<T>::kSize + first; i < n; i += step) out[i] = from_float<T>(gelu(to_float(x[i])));
}

template <class T>
__global__ void gelu_backward_kernel(T* dx, const T* dout, const T* x, int64_t n, int64_t packs) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < packs; i += step) {
    Pack<T> p = reinterpret_cast<const Pack<T>*>(x)[i];
    const Pack<T> d = reinterpret_cast<const Pack<T>*>(dout)[i];
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j)
      p.values[j] = from_float<T>(to_float(d.values[j]) * gelu_derivative(to_float(p.values[j])));
    reinterpret_cast<Pack<T>*>(dx)[i] = p;
  }
  for (int64_t i = packs * Pack<T>::kSize + first; i < n; i += step)
    dx[i] = from_float<T>(to_float(dout[i]) * gelu_derivative(to_float(x[i])));
}

// How many packs may be read at once: none when an address is not aligned.
template <class T>
int64_t packs_for(int64_t n, const void* a, const void* b, const void* c) {
  const uintptr_t any =
      reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b) | reinterpret_cast<uintptr_t>(c);
  return any % 16 == 0 ? n / Pack<T>::kSize : 0;
}

template <class T>
cudaError_t gelu_forward(void* out, const void* x, int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t packs = packs_for<T>(n, out, x, x);
  return launch(gelu_forward_kernel<T>, blocks_for(packs ? packs : n, 256, 4096), 256, 0, stream, static_cast<T*>(out),
                static_cast<const T*>(x), n, packs);
}

template <class T>
cudaError_t gelu_backward(void* dx, const void* dout, const void* x, int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const int64_t packs = packs_for<T>(n, dx, dout, x);
  return launch(gelu_backward_kernel<T>, blocks_for(packs ? packs : n, 256, 4096), 256, 0, stream, static_cast<T*>(dx),
                static_cast<const T*>(dout), static_cast<const T*>(x), n, packs);
}

}  // namespace cuda
}  // namespace fastgpt
