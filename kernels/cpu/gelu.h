// GELU, tanh form, of x + bias.
//
//   v = x + bias,  u = sqrt(2/pi) * (v + 0.044715 v^3),  y = v/2 * (1 + tanh u) = v * s,  s = 1 / (1 + e^(-2u))
//   dx = dout * dy/dv,  dy/dv = s + v * s * (1 - s) * 2 u',  u' = sqrt(2/pi) * (1 + 3 * 0.044715 v^2)
//   dbias = the sum of dx over the rows
//
// The sigmoid form needs one exp and one division, and unlike 1 + tanh u it does not cancel for negative v.
// Work: one contiguous part a thread, whole rows when there is a bias; dbias is summed as row_sums.h says. Bytes:
// forward one read and one write, backward two reads and one write. Paper: Hendrycks, Gimpel, "Gaussian Error Linear
// Units", 2016.
#pragma once

#include "parallel.h"
#include "row_sums.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr float kTwoSqrt2OverPi = 1.5957691216f;
constexpr float kGeluCubic = 0.044715f;

// e^(-2u) as a power of two, at most 2^126.
FASTGPT_INLINE VecF gelu_exponential(VecF x) {
  const VecF power = x * (-kTwoSqrt2OverPi * kLog2E - kTwoSqrt2OverPi * kLog2E * kGeluCubic * x * x);
  return exp2(min(power, splat(126.0f)));
}

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
  const int64_t count = a.rows * a.n;
  parallel_ranges(count, threads_for(count, 8192, a.num_threads), [&](int64_t begin, int64_t end, int) {
    for_lanes(end - begin,
              [&](int64_t i, int64_t c) { store_lanes(out + begin + i, gelu(load_lanes(x + begin + i, c)), c); });
  });
}

template <class T, class W>
static void gelu_bias_forward_kernel(const GeluForwardArgs& a) {
  const W* bias = static_cast<const W*>(a.bias);
  parallel_ranges(a.rows, threads_for(a.rows * a.n, 8192, a.num_threads), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.n;
      T* out = static_cast<T*>(a.out) + row * a.n;
      for_lanes(a.n, [&](int64_t i, int64_t c) {
        store_lanes(out + i, gelu(load_lanes(x + i, c) + load_lanes(bias + i, c)), c);
      });
    }
  });
}

template <class T>
static void gelu_backward_kernel(const GeluBackwardArgs& a) {
  const T *x = static_cast<const T*>(a.x), *dout = static_cast<const T*>(a.dout);
  T* dx = static_cast<T*>(a.dx);
  const int64_t count = a.rows * a.n;
  parallel_ranges(count, threads_for(count, 8192, a.num_threads), [&](int64_t begin, int64_t end, int) {
    for_lanes(end - begin, [&](int64_t i, int64_t c) {
      const VecF d = load_lanes(dout + begin + i, c);
      store_lanes(dx + begin + i, d * gelu_derivative(load_lanes(x + begin + i, c)), c);
    });
  });
}

template <class T, class W>
static void gelu_bias_backward_kernel(const GeluBackwardArgs& a) {
  const W* bias = static_cast<const W*>(a.bias);
  const int threads = threads_for(a.rows * a.n, 8192, a.num_threads);
  for_rows_with_sums(a.rows, a.n, threads, a.partial, [&](int64_t row, float* sums, int) {
    const T *x = static_cast<const T*>(a.x) + row * a.n, *dout = static_cast<const T*>(a.dout) + row * a.n;
    T* dx = static_cast<T*>(a.dx) + row * a.n;
    for_lanes(a.n, [&](int64_t i, int64_t c) {
      const VecF v = load_lanes(x + i, c) + load_lanes(bias + i, c);
      // The lanes past the end hold dout = 0, so they add nothing.
      const VecF d = load_lanes(dout + i, c) * gelu_derivative(v);
      store_lanes(dx + i, d, c);
      store_lanes(sums + i, load_lanes(sums + i, c) + d, c);
    });
  });
  add_threads(static_cast<W*>(a.dbias), a.partial, a.n, threads, 0, a.n);
}

static void gelu_forward(const GeluForwardArgs& a) {
  const bool wide = a.dtype == DType::kFloat32;
  if (!a.bias) return wide ? gelu_forward_kernel<float>(a) : gelu_forward_kernel<Bf16>(a);
  if (wide) return gelu_bias_forward_kernel<float, float>(a);
  a.bias_dtype == DType::kFloat32 ? gelu_bias_forward_kernel<Bf16, float>(a) : gelu_bias_forward_kernel<Bf16, Bf16>(a);
}

static void gelu_backward(const GeluBackwardArgs& a) {
  const bool wide = a.dtype == DType::kFloat32;
  if (!a.bias) return wide ? gelu_backward_kernel<float>(a) : gelu_backward_kernel<Bf16>(a);
  if (wide) return gelu_bias_backward_kernel<float, float>(a);
  a.bias_dtype == DType::kFloat32 ? gelu_bias_backward_kernel<Bf16, float>(a)
                                  : gelu_bias_backward_kernel<Bf16, Bf16>(a);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
