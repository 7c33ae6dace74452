// Layer normalisation.
//
//   forward    y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var + eps), var biased
//   backward   h = (x - mean) * rstd,  g = dout * weight
//              dx = rstd * (g - mean(g) - h * mean(g * h)),  dweight = sum over rows of dout * h,  dbias = sum of dout
//
// Work: rows are split into one contiguous part a thread. A row (3 kB at n = 768) is read from memory once and stays in
// L1 for the passes after the first: mean, then the variance about that mean (not E[x^2] - E[x]^2, which cancels), then
// the output. dweight and dbias are summed as row_sums.h says. Bytes: forward one read and one write of the tensor,
// backward two reads and one write. Paper: Ba, Kiros, Hinton, "Layer Normalization", 2016.
#pragma once

#include <cmath>

#include "parallel.h"
#include "row_sums.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

template <class T, class W>
FASTGPT_INLINE void layer_norm_forward_row(T* out, float* mean_out, float* rstd_out, const T* x, const W* weight,
                                           const W* bias, int64_t n, float eps) {
  const float mean = sum_lanes(n, [&](int64_t i, int64_t c) { return load_lanes(x + i, c); }) / n;
  const float var = sum_lanes(n,
                              [&](int64_t i, int64_t c) {
                                const VecF centred = load_lanes(x + i, c) - mean;
                                return centred * centred;
                              }) /
                    n;
  const float rstd = 1.0f / std::sqrt(var + eps);
  *mean_out = mean;
  *rstd_out = rstd;
  for_lanes(n, [&](int64_t i, int64_t c) {
    const VecF normalised = (load_lanes(x + i, c) - mean) * rstd;
    store_lanes(out + i, normalised * load_lanes(weight + i, c) + load_lanes(bias + i, c), c);
  });
}

template <class T, class W>
static void layer_norm_forward_kernel(const LayerNormForwardArgs& a) {
  const W *weight = static_cast<const W*>(a.weight), *bias = static_cast<const W*>(a.bias);
  const int threads = threads_for(a.rows * a.n, 16384, a.num_threads);
  parallel_ranges(a.rows, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      layer_norm_forward_row(static_cast<T*>(a.out) + row * a.n, a.mean + row, a.rstd + row,
                             static_cast<const T*>(a.x) + row * a.x_stride, weight, bias, a.n, a.eps);
    }
  });
}

// Calls write(i, count, dx) for the lanes of one row, and adds what the row gives to dweight and dbias.
template <class T, class W, class Write>
FASTGPT_INLINE void layer_norm_backward_row(const T* dout, const T* x, const W* weight, float mean, float rstd,
                                            int64_t n, float* dweight, float* dbias, Write write) {
  VecF sum_g = {}, sum_gh = {};
  for_lanes(n, [&](int64_t i, int64_t c) {
    const VecF h = (load_lanes(x + i, c) - mean) * rstd;
    const VecF d = load_lanes(dout + i, c);
    // The lanes past the end hold d = 0, so they add nothing.
    const VecF g = d * load_lanes(weight + i, c);
    sum_g += g;
    sum_gh += g * h;
    store_lanes(dweight + i, load_lanes(dweight + i, c) + d * h, c);
    store_lanes(dbias + i, load_lanes(dbias + i, c) + d, c);
  });
  const float mean_g = reduce_add(sum_g) / n, mean_gh = reduce_add(sum_gh) / n;
  for_lanes(n, [&](int64_t i, int64_t c) {
    const VecF h = (load_lanes(x + i, c) - mean) * rstd;
    const VecF g = load_lanes(dout + i, c) * load_lanes(weight + i, c);
    write(i, c, (g - mean_g - h * mean_gh) * rstd);
  });
}

template <class T, class W>
static void layer_norm_backward_kernel(const LayerNormBackwardArgs& a) {
  const int64_t n = a.n;
  const int threads = threads_for(a.rows * n, 8192, a.num_threads);
  for_rows_with_sums(a.rows, 2 * n, threads, a.partial, [&](int64_t row, float* sums, int) {
    T* dx = static_cast<T*>(a.dx) + row * n;
    layer_norm_backward_row(static_cast<const T*>(a.dout) + row * a.dout_stride,
                            static_cast<const T*>(a.x) + row * a.x_stride, static_cast<const W*>(a.weight), a.mean[row],
                            a.rstd[row], n, sums, sums + n,
                            [&](int64_t i, int64_t c, VecF d) { store_lanes(dx + i, d, c); });
  });
  add_threads(static_cast<W*>(a.dweight), a.partial, 2 * n, threads, 0, n);
  add_threads(static_cast<W*>(a.dbias), a.partial, 2 * n, threads, n, n);
}

static void layer_norm_forward(const LayerNormForwardArgs& a) {
  if (a.dtype == DType::kFloat32) return layer_norm_forward_kernel<float, float>(a);
  if (a.weight_dtype == DType::kFloat32) return layer_norm_forward_kernel<Bf16, float>(a);
  return layer_norm_forward_kernel<Bf16, Bf16>(a);
}

static void layer_norm_backward(const LayerNormBackwardArgs& a) {
  if (a.dtype == DType::kFloat32) return layer_norm_backward_kernel<float, float>(a);
  if (a.weight_dtype == DType::kFloat32) return layer_norm_backward_kernel<Bf16, float>(a);
  return layer_norm_backward_kernel<Bf16, Bf16>(a);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
