// Dropout, residual addition and layer normalisation.
//
//   forward    total = residual + dropout(x),  normed = layer_norm(total)
//   backward   d = dtotal + (gradient of layer_norm for dnormed),  dresidual = d,  dx = d * mask * scale
//
// Work: rows are split into one contiguous part a thread. The sum of a row is written once and stays in L1 for the
// norm; the mask is drawn by Philox (philox.h) in both directions instead of being stored. Statistics come from the sum
// as it is stored, so bfloat16 gives what the separate ops give. dweight and dbias: row_sums.h. Bytes: forward two
// reads and two writes of the tensor, backward three reads (two when dtotal is null) and two writes (one without
// dropout).
#pragma once

#include "layer_norm.h"
#include "philox.h"

namespace fastgpt {
namespace FASTGPT_ISA {

template <class T, class W>
static void dropout_add_layer_norm_forward_kernel(const DropoutAddLayerNormForwardArgs& a) {
  const int64_t n = a.n;
  const W *weight = static_cast<const W*>(a.weight), *bias = static_cast<const W*>(a.bias);
  const RowDropout dropout(a.seed, a.dropout_threshold);
  const int threads = threads_for(a.rows * n, 16384, a.num_threads);
  parallel_ranges(a.rows, threads, [&](int64_t begin, int64_t end, int thread) {
    float* factors = a.factors + thread * RowDropout::padded(n);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
      const T* residual = static_cast<const T*>(a.residual) + row * a.residual_stride;
      T* total = static_cast<T*>(a.total) + row * n;
      if (a.dropout_threshold == 0) {
        for_lanes(n, [&](int64_t i, int64_t c) {
          store_lanes(total + i, load_lanes(residual + i, c) + load_lanes(x + i, c), c);
        });
      } else {
        dropout.factors(factors, row, n);
        for_lanes(n, [&](int64_t i, int64_t c) {
          const VecF kept = load_lanes(x + i, c) * load_lanes(factors + i, c);
          store_lanes(total + i, load_lanes(residual + i, c) + kept, c);
        });
      }
      layer_norm_forward_row(static_cast<T*>(a.normed) + row * n, a.mean + row, a.rstd + row, total, weight, bias, n,
                             a.eps);
    }
  });
}

// What a row writes, for all that does or does not exist.
template <class T, bool kDtotal, bool kDropout>
struct DropoutAddWrite {
  T *dx, *dresidual;
  const T* dtotal;
  const float* factors;

  FASTGPT_INLINE void row(const DropoutAddWrite& w, int64_t i, int64_t c, VecF d) {
    if constexpr (kDtotal) d += load_lanes(w.dtotal + i, c);
    store_lanes(w.dresidual + i, d, c);
    if constexpr (kDropout) store_lanes(w.dx + i, d * load_lanes(w.factors + i, c), c);
  }
};

template <class T, class W, bool kDtotal, bool kDropout>
static void dropout_add_layer_norm_backward_kernel(const DropoutAddLayerNormBackwardArgs& a) {
  const int64_t n = a.n;
  const RowDropout dropout(a.seed, a.dropout_threshold);
  const int threads = threads_for(a.rows * n, 8192, a.num_threads);
  for_rows_with_sums(a.rows, 2 * n, threads, a.partial, [&](int64_t row, float* sums, int thread) {
    float* factors = a.factors + thread * RowDropout::padded(n);
    if constexpr (kDropout) dropout.factors(factors, row, n);
    using Write = DropoutAddWrite<T, kDtotal, kDropout>;
    const Write write = {kDropout ? static_cast<T*>(a.dx) + row * n : nullptr, static_cast<T*>(a.dresidual) + row * n,
                         kDtotal ? static_cast<const T*>(a.dtotal) + row * a.dtotal_stride : nullptr, factors};
    layer_norm_backward_row(static_cast<const T*>(a.dnormed) + row * a.dnormed_stride,
                            static_cast<const T*>(a.total) + row * n, static_cast<const W*>(a.weight), a.mean[row],
                            a.rstd[row], n, sums, sums + n,
                            [&](int64_t i, int64_t c, VecF d) { Write::row(write, i, c, d); });
  });
  add_threads(static_cast<W*>(a.dweight), a.partial, 2 * n, threads, 0, n);
  add_threads(static_cast<W*>(a.dbias), a.partial, 2 * n, threads, n, n);
}

template <class T, class W>
static void dropout_add_layer_norm_backward_typed(const DropoutAddLayerNormBackwardArgs& a) {
  const bool dropout = a.dropout_threshold > 0;
  if (a.dtotal) {
    dropout ? dropout_add_layer_norm_backward_kernel<T, W, true, true>(a)
            : dropout_add_layer_norm_backward_kernel<T, W, true, false>(a);
  } else {
    dropout ? dropout_add_layer_norm_backward_kernel<T, W, false, true>(a)
            : dropout_add_layer_norm_backward_kernel<T, W, false, false>(a);
  }
}

// Floats that a thread needs for the factors of a row.
static int64_t dropout_row_floats(int64_t n) { return RowDropout::padded(n); }

static void dropout_add_layer_norm_forward(const DropoutAddLayerNormForwardArgs& a) {
  if (a.dtype == DType::kFloat32) return dropout_add_layer_norm_forward_kernel<float, float>(a);
  if (a.weight_dtype == DType::kFloat32) return dropout_add_layer_norm_forward_kernel<Bf16, float>(a);
  return dropout_add_layer_norm_forward_kernel<Bf16, Bf16>(a);
}

static void dropout_add_layer_norm_backward(const DropoutAddLayerNormBackwardArgs& a) {
  if (a.dtype == DType::kFloat32) return dropout_add_layer_norm_backward_typed<float, float>(a);
  if (a.weight_dtype == DType::kFloat32) return dropout_add_layer_norm_backward_typed<Bf16, float>(a);
  return dropout_add_layer_norm_backward_typed<Bf16, Bf16>(a);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
