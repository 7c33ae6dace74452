// GELU, tanh form.
//
//   u = sqrt(2/pi) * (x + 0.044715 x^3),  y = x/2 * (1 + tanh u) = x * s,  s = 1 / (1 + e^(-2u))
//   dy/dx = s + x * s * (1 - s) * 2 u',  u' = sqrt(2/pi) * (1 + 3 * 0.044715 x^2)
//
// The sigmoid form needs one exp and one division, and unlike 1 + tanh u it does not cancel for negative x.
// Work: one contiguous part a thread. Bytes: forward one read and one write, backward two reads and one write.
// Paper: Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.
#pragma once

#include "parallel.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr float kTwoSqrt2OverPi = 1.5957691216f;
constexpr float kGeluCubic = 0.044715f;

// e^(-2u)
FASTGPT_INLINE VecF gelu_exponential(VecF x) { return exp(-(x * kTwoSqrt2OverPi * (1.0f + kGeluCubic * x * x))); }

FASTGPT_INLINE VecF gelu(VecF x) {
  const VecF s = 1.0f / (1.0f + gelu_exponential(x));
  // For x = -inf the product would be -inf * 0; the limit is 0.
  return x == splat(-__builtin_inff()) ? VecF{} : x * s;
}

FASTGPT_INLINE VecF gelu_derivative(VecF x) {
  // Beyond |x| = 10 the second term is below 1e-30; clamping keeps x^3 from overflowing there.
  const VecF t = min(max(x, splat(-10.0f)), splat(10.0f));
  const VecF e = gelu_exponential(t);
  const VecF s = 1.0f / (1.0f + e);
  // 1 - s as e * s: the difference would lose the digits that the large factor behind it brings back.
  return s + t * s * (e * s) * kTwoSqrt2OverPi * (1.0f + 3.0f * kGeluCubic * t * t);
}

template <class T>
static void gelu_forward_kernel(const GeluForwardArgs& a) {
  const T* x = static_cast<const T*>(a.x);
  T* out = static_cast<T*>(a.out);
  parallel_ranges(a.n, threads_for(a.n, 8192, a.num_threads), [&](int64_t begin, int64_t end, int) {
    for_lanes(end - begin,
              [&](int64_t i, int64_t c) { store_lanes(out + begin + i, gelu(load_lanes(x + begin + i, c)), c); });
  });
}

template <class T>
static void gelu_backward_kernel(const GeluBackwardArgs& a) {
  const T *x = static_cast<const T*>(a.x), *dout = static_cast<const T*>(a.dout);
  T* dx = static_cast<T*>(a.dx);
  parallel_ranges(a.n, threads_for(a.n, 8192, a.num_threads), [&](int64_t begin, int64_t end, int) {
    for_lanes(end - begin, [&](int64_t i, int64_t c) {
      const VecF d = load_lanes(dout + begin + i, c);
      store_lanes(dx + begin + i, d * gelu_derivative(load_lanes(x + begin + i, c)), c);
    });
  });
}

static void gelu_forward(const GeluForwardArgs& a) {
  a.dtype == DType::kFloat32 ? gelu_forward_kernel<float>(a) : gelu_forward_kernel<Bf16>(a);
}

static void gelu_backward(const GeluBackwardArgs& a) {
  a.dtype == DType::kFloat32 ? gelu_backward_kernel<float>(a) : gelu_backward_kernel<Bf16>(a);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
