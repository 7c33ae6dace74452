// Layer normalisation.
//
//   forward    y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var + eps), var biased
//   backward   h = (x - mean) * rstd,  g = dout * weight
//              dx = rstd * (g - mean(g) - h * mean(g * h)),  dweight = sum over rows of dout * h,  dbias = sum of dout
//
// Work: rows are split into one contiguous part a thread. A row (3 kB at n = 768) is read from memory once and stays in
// L1 for the passes after the first: mean, then the variance about that mean (not E[x^2] - E[x]^2, which cancels), then
// the output. Backward sums dweight and dbias per thread in `partial`, in blocks of 64 rows that are then added up (one
// sum over thousands of rows would lose four times as many digits as PyTorch's), and adds the threads in their order,
// so a run with the same number of threads gives the same bits. Bytes: forward one read and one write of the tensor,
// backward two reads and one write. Paper: Ba, Kiros, Hinton, "Layer Normalization", 2016.
#pragma once

#include <cmath>

#include "parallel.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int64_t kRowsPerSum = 64;

template <class T, class W>
static void layer_norm_forward_kernel(const LayerNormForwardArgs& a) {
  const int64_t n = a.n;
  const W *weight = static_cast<const W*>(a.weight), *bias = static_cast<const W*>(a.bias);
  const int threads = threads_for(a.rows * n, 16384, a.num_threads);
  parallel_ranges(a.rows, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
      T* out = static_cast<T*>(a.out) + row * n;
      const float mean = sum_lanes(n, [&](int64_t i, int64_t c) { return load_lanes(x + i, c); }) / n;
      const float var = sum_lanes(n,
                                  [&](int64_t i, int64_t c) {
                                    const VecF centred = load_lanes(x + i, c) - mean;
                                    return centred * centred;
                                  }) /
                        n;
      const float rstd = 1.0f / std::sqrt(var + a.eps);
      a.mean[row] = mean;
      a.rstd[row] = rstd;
      for_lanes(n, [&](int64_t i, int64_t c) {
        const VecF normalised = (load_lanes(x + i, c) - mean) * rstd;
        store_lanes(out + i, normalised * load_lanes(weight + i, c) + load_lanes(bias + i, c), c);
      });
    }
  });
}

template <class T, class W>
static void layer_norm_backward_row(const LayerNormBackwardArgs& a, int64_t row, float* dweight, float* dbias) {
  const int64_t n = a.n;
  const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
  const T* dout = static_cast<const T*>(a.dout) + row * a.dout_stride;
  const W* weight = static_cast<const W*>(a.weight);
  T* dx = static_cast<T*>(a.dx) + row * n;
  const float mean = a.mean[row], rstd = a.rstd[row];

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
    store_lanes(dx + i, (g - mean_g - h * mean_gh) * rstd, c);
  });
}

// sums += block, block = 0
static void layer_norm_add_block(float* sums, float* block, int64_t n) {
  for_lanes(n, [&](int64_t i, int64_t c) {
    store_lanes(sums + i, load_lanes(sums + i, c) + load_lanes(block + i, c), c);
    store_lanes(block + i, VecF{}, c);
  });
}

template <class T, class W>
static void layer_norm_backward_kernel(const LayerNormBackwardArgs& a) {
  const int64_t n = a.n;
  const int threads = threads_for(a.rows * n, 8192, a.num_threads);
  memset(a.partial, 0, sizeof(float) * 4 * n * threads);
  parallel_ranges(a.rows, threads, [&](int64_t begin, int64_t end, int thread) {
    float *sums = a.partial + 4 * n * thread, *block = sums + 2 * n;
    for (int64_t row = begin; row < end; ++row) {
      layer_norm_backward_row<T, W>(a, row, block, block + n);
      if ((row - begin) % kRowsPerSum == kRowsPerSum - 1 || row + 1 == end) layer_norm_add_block(sums, block, 2 * n);
    }
  });
  for_lanes(n, [&](int64_t i, int64_t c) {
    VecF dweight = {}, dbias = {};
    for (int thread = 0; thread < threads; ++thread) {
      dweight += load_lanes(a.partial + 4 * n * thread + i, c);
      dbias += load_lanes(a.partial + 4 * n * thread + n + i, c);
    }
    store_lanes(static_cast<W*>(a.dweight) + i, dweight, c);
    store_lanes(static_cast<W*>(a.dbias) + i, dbias, c);
  });
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
