// Backward of causal attention; see attention.h.
#pragma once

#include "attention_tile.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// ..._steps: the numbers above them, but that it is rows that make the steps; where a step is one number, the same
// memory.
template <class Step>
struct AttentionBackwardWorkspace {
  int64_t ld;                          // the length of rows of steps
  Step *k, *v;                         // (k_padded, ld)
  Step* k_steps;                       // (k_padded / kPerStep, n_padded)
  Step *q, *q_transposed;              // (kBlockM, ld), (ld, kBlockM)
  Step *dout, *dout_transposed;        // the same
  Step *q_steps, *dout_steps;          // (kBlockM / kPerStep, n_padded)
  float* scores;                       // (kBlockN, kBlockM): scores, and weights after dropout written over them
  float* dscores;                      // (kBlockN, kBlockM): dout v^T, and the gradient of the scores over it
  Step* dscores_steps;                 // (kBlockN / kPerStep, kBlockM)
  float* dq;                           // (kBlockM, n_padded)
  float *lse, *delta;                  // (kBlockM): lse in powers of 2; dout . out of a row
  float *dk = nullptr, *dv = nullptr;  // (k_padded, n_padded): sums of one item
  int64_t floats;

  AttentionBackwardWorkspace(const Plan& plan, float* base) : ld(row_steps<Step>(plan.n_padded)) {
    Pieces pieces{base};
    const auto take_steps = [&](Step* rows, int64_t n_rows, int64_t n) {
      return kPerStep<Step> == 1 ? rows : pieces.take<Step>(n_rows / kPerStep<Step> * n);
    };
    k = pieces.take<Step>(plan.k_padded * ld);
    k_steps = take_steps(k, plan.k_padded, plan.n_padded);
    v = pieces.take<Step>(plan.k_padded * ld);
    q = pieces.take<Step>(kBlockM * ld);
    q_transposed = pieces.take<Step>(kBlockM * ld);
    q_steps = take_steps(q, kBlockM, plan.n_padded);
    dout = pieces.take<Step>(kBlockM * ld);
    dout_transposed = pieces.take<Step>(kBlockM * ld);
    dout_steps = take_steps(dout, kBlockM, plan.n_padded);
    scores = pieces.take(kBlockN * kBlockM);
    dscores = pieces.take(kBlockN * kBlockM);
    dscores_steps = take_steps(reinterpret_cast<Step*>(dscores), kBlockN, kBlockM);
    dq = pieces.take(kBlockM * plan.n_padded);
    lse = pieces.take(kBlockM);
    delta = pieces.take(kBlockM);
    floats = pieces.used;
  }
};

// Copies rows of one head as pack_rows does and, where that is something else, as pack_row_steps does.
template <class Step, class T>
static void pack_both_ways(Step* rows, Step* steps, const T* x, int64_t stride, int64_t n_rows, int64_t rows_padded,
                           int64_t n, int64_t ld, int64_t n_padded) {
  pack_rows(rows, x, stride, n_rows, rows_padded, n, ld);
  if (steps != rows) pack_row_steps(steps, x, stride, n_rows, rows_padded, n, n_padded);
}

// Copies the rows of a block of queries: q and dout both ways round, lse and delta.
template <class T>
static void attention_backward_load(const AttentionBackwardArgs& a, const AttentionBackwardWorkspace<StepOf<T>>& w,
                                    int64_t n_padded, int64_t batch, int64_t head, const QueryBlock& block) {
  const AttentionSizes& s = a.sizes;
  const int64_t padded_rows = block.padded_rows();
  const T* q = head_rows<const T>(a.q, batch, head) + block.first * a.q.row_stride;
  const T* dout = head_rows<const T>(a.dout, batch, head) + block.first * a.dout.row_stride;
  const T* out = head_rows<const T>(a.out, batch, head) + block.first * a.out.row_stride;
  const float* lse = a.lse + (batch * s.n_heads + head) * s.q_len + block.first;
  pack_both_ways(w.q, w.q_steps, q, a.q.row_stride, block.rows, padded_rows, s.head_dim, w.ld, n_padded);
  transpose_rows(w.q_transposed, kBlockM, w.q, padded_rows, w.ld);
  pack_both_ways(w.dout, w.dout_steps, dout, a.dout.row_stride, block.rows, padded_rows, s.head_dim, w.ld, n_padded);
  transpose_rows(w.dout_transposed, kBlockM, w.dout, padded_rows, w.ld);
  for (int64_t row = 0; row < padded_rows; ++row) {
    const bool real = row < block.rows;
    w.lse[row] = real ? lse[row] * kLog2E : 0.0f;
    w.delta[row] = real ? sum_lanes(s.head_dim,
                                    [&](int64_t i, int64_t c) {
                                      return load_lanes(dout + row * a.dout.row_stride + i, c) *
                                             load_lanes(out + row * a.out.row_stride + i, c);
                                    })
                        : 0.0f;
  }
  memset(w.dq, 0, sizeof(float) * padded_rows * n_padded);
}

// Turns one vector of rows of a tile from scores and dout v^T into weights (after dropout) and the gradient of the
// scores, p * (keep * dout v^T - delta).
template <bool kDropout, class Step>
FASTGPT_INLINE void attention_softmax_backward(const AttentionBackwardWorkspace<Step>& w, const Tile& tile, int64_t row,
                                               const Dropout& dropout, VecU queries) {
  constexpr int kKeys = kPerStep<Step>;
  hide_scores(w.scores, tile, row);
  const VecF lse = load(w.lse + row), delta = load(w.delta + row);
  const auto keys = [&](int64_t j, const VecI(&keep)[kKeys]) {
    VecF ds[kKeys];
#pragma GCC unroll 2
    for (int i = 0; i < kKeys; ++i) {
      float *scores = w.scores + (j + i) * kBlockM, *dscores = w.dscores + (j + i) * kBlockM;
      const VecF p = exp2(load(scores + row) - lse);
      const VecF dp = (VecF)((VecI)load(dscores + row) & keep[i]);
      ds[i] = p * (dp - delta);
      store(reinterpret_cast<Weight<Step>*>(scores) + row, (VecF)((VecI)p & keep[i]));
      store(reinterpret_cast<Weight<Step>*>(dscores) + row, ds[i]);
    }
    if constexpr (kKeys > 1) store(w.dscores_steps + j / kKeys * kBlockM + row, make_step(ds));
  };
  for_keys<kDropout, kKeys>(dropout, queries, tile.first_key, tile.computed(row), keys);
}

// dv += weights dout, dk += dscores q, dq += dscores^T k, each over the part of the tile that is not hidden.
template <class Step>
static void attention_backward_accumulate(const AttentionBackwardWorkspace<Step>& w, const Tile& tile, int64_t rows,
                                          int64_t n_padded) {
  const int64_t vectors = n_padded / kLanes;
  float *dk = w.dk + tile.first_key * n_padded, *dv = w.dv + tile.first_key * n_padded;
  const Step *weights = reinterpret_cast<Step*>(w.scores), *dscores = reinterpret_cast<Step*>(w.dscores);
  for (int64_t j = 0; j < tile.keys; j += kMr) {
    const int64_t row = tile.first_vector(j) * kLanes;
    if (row >= rows) break;
    const int64_t first = row / kPerStep<Step>, steps = steps_of<Step>(rows - row);
    for_vector_groups(0, vectors, [&](int64_t v, auto count) {
      const int64_t n = v * kLanes;
      add_product<count, Layout::kRows>(dv + j * n_padded + n, n_padded, weights + j * kBlockM + first, kBlockM,
                                        w.dout_steps + first * n_padded + n, n_padded, steps, nullptr);
      add_product<count, Layout::kRows>(dk + j * n_padded + n, n_padded, dscores + j * kBlockM + first, kBlockM,
                                        w.q_steps + first * n_padded + n, n_padded, steps, nullptr);
    });
  }
  const Step* k = w.k_steps + tile.first_key / kPerStep<Step> * n_padded;
  for (int64_t row = 0; row < rows; row += kMr) {
    const int64_t keys = tile.visible(row + kMr - 1);
    if (keys == 0) continue;
    for_vector_groups(0, vectors, [&](int64_t v, auto count) {
      add_product<count, Layout::kColumns>(w.dq + row * n_padded + v * kLanes, n_padded, w.dscores_steps + row, kBlockM,
                                           k + v * kLanes, n_padded, steps_of<Step>(keys), nullptr);
    });
  }
}

template <class T, bool kDropout>
static void attention_backward_block(const AttentionBackwardArgs& a, const AttentionBackwardWorkspace<StepOf<T>>& w,
                                     int64_t n_padded, int64_t batch, int64_t head, const QueryBlock& block) {
  const AttentionSizes& s = a.sizes;
  const int64_t padded_rows = block.padded_rows(), steps = steps_of<StepOf<T>>(s.head_dim);
  attention_backward_load<T>(a, w, n_padded, batch, head, block);
  const Dropout dropout = dropout_of(a, batch * s.n_heads + head);
  for (int64_t first_key = 0; first_key < block.keys(); first_key += kBlockN) {
    const Tile tile = block.tile(first_key);
    tile_scores(w.scores, tile, padded_rows, w.k + first_key * w.ld, w.ld, w.q_transposed, steps,
                a.softmax_scale * kLog2E);
    tile_scores(w.dscores, tile, padded_rows, w.v + first_key * w.ld, w.ld, w.dout_transposed, steps,
                dropout_scale(a.dropout_threshold));
    for (int64_t row = 0; row < padded_rows; row += kLanes) {
      const VecU queries = (VecU)lane_numbers() + static_cast<uint32_t>(block.first + row);
      attention_softmax_backward<kDropout>(w, tile, row, dropout, queries);
    }
    attention_backward_accumulate(w, tile, block.rows, n_padded);
  }
  T* dq = head_rows<T>(a.dq, batch, head) + block.first * a.dq.row_stride;
  unpack_rows(dq, a.dq.row_stride, w.dq, block.rows, s.head_dim, n_padded, [&](int64_t) { return a.softmax_scale; });
}

// dk and dv of one head: the sums of its parts, added in the order of the parts.
template <class T>
static void attention_backward_store(const AttentionBackwardArgs& a, const Plan& plan, int64_t batch, int64_t head,
                                     float* sums) {
  const int64_t floats = plan.k_padded * plan.n_padded;
  for (int64_t part = 1; part < plan.parts; ++part) {
    const float* more = sums + 2 * floats * part;
    for (int64_t i = 0; i < 2 * floats; i += kLanes) store(sums + i, load(sums + i) + load(more + i));
  }
  const AttentionSizes& s = a.sizes;
  unpack_rows(head_rows<T>(a.dk, batch, head), a.dk.row_stride, sums, s.k_len, s.head_dim, plan.n_padded,
              [&](int64_t) { return a.softmax_scale; });
  unpack_rows(head_rows<T>(a.dv, batch, head), a.dv.row_stride, sums + floats, s.k_len, s.head_dim, plan.n_padded,
              [&](int64_t) { return dropout_scale(a.dropout_threshold); });
}

template <class T, bool kDropout>
static void attention_backward_kernel(const AttentionBackwardArgs& a) {
  const AttentionSizes& s = a.sizes;
  const Plan plan(s, a.num_threads);
  using Workspace = AttentionBackwardWorkspace<StepOf<T>>;
  const int64_t floats = Workspace(plan, nullptr).floats;
  const int64_t head_floats = plan.k_padded * plan.n_padded;
  float* sums = a.workspace + floats * plan.threads;
  parallel_items(plan.items, plan.threads, [&](int64_t item, int thread) {
    Workspace w(plan, a.workspace + thread * floats);
    w.dk = sums + 2 * head_floats * (plan.parts == 1 ? thread : item);
    w.dv = w.dk + head_floats;
    memset(w.dk, 0, sizeof(float) * 2 * head_floats);
    const int64_t batch = item / plan.parts / s.n_heads, head = item / plan.parts % s.n_heads;
    pack_both_ways(w.k, w.k_steps, head_rows<const T>(a.k, batch, head), a.k.row_stride, s.k_len, plan.k_padded,
                   s.head_dim, w.ld, plan.n_padded);
    pack_rows(w.v, head_rows<const T>(a.v, batch, head), a.v.row_stride, s.k_len, plan.k_padded, s.head_dim, w.ld);
    for (int64_t block = plan.q_blocks - 1 - item % plan.parts; block >= 0; block -= plan.parts) {
      attention_backward_block<T, kDropout>(a, w, plan.n_padded, batch, head, QueryBlock(block, s.q_len, s.k_len));
    }
    if (plan.parts == 1) attention_backward_store<T>(a, plan, batch, head, w.dk);
  });
  if (plan.parts == 1) return;
  parallel_items(s.batch * s.n_heads, plan.threads, [&](int64_t item, int) {
    attention_backward_store<T>(a, plan, item / s.n_heads, item % s.n_heads,
                                sums + 2 * head_floats * plan.parts * item);
  });
}

static void attention_backward(const AttentionBackwardArgs& a) {
  with_kernel_types(a, [&](auto t, auto dropout) { attention_backward_kernel<decltype(t), dropout>(a); });
}

static int64_t attention_backward_floats(const AttentionSizes& sizes, DType dtype, int num_threads) {
  const Plan plan(sizes, num_threads);
  const int64_t sums = plan.parts == 1 ? plan.threads : plan.items;
  const int64_t floats =
      with_step(dtype, [&](auto step) { return AttentionBackwardWorkspace<decltype(step)>(plan, nullptr).floats; });
  return plan.threads * floats + sums * 2 * plan.k_padded * plan.n_padded;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
