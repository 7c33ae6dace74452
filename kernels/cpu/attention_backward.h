// Backward of causal attention; see attention.h.
#pragma once

#include "attention_tile.h"

namespace fastgpt {
namespace FASTGPT_ISA {

struct AttentionBackwardWorkspace {
  float *k, *v;                        // (k_padded, n_padded)
  float *q, *q_transposed;             // (kBlockM, n_padded), (n_padded, kBlockM)
  float *dout, *dout_transposed;       // the same, times the scale of dropout
  float* weights;                      // (kBlockN, kBlockM): scores, then weights after dropout
  float* dscores;                      // (kBlockN, kBlockM): dout v^T, then the gradient of the scores
  float* dq;                           // (kBlockM, n_padded)
  float *lse, *delta;                  // (kBlockM): lse in powers of 2; dout . out of a row
  float *dk = nullptr, *dv = nullptr;  // (k_padded, n_padded): sums of one item
  int64_t floats;

  AttentionBackwardWorkspace(const Plan& plan, float* base) {
    Pieces pieces{base};
    k = pieces.take(plan.k_padded * plan.n_padded);
    v = pieces.take(plan.k_padded * plan.n_padded);
    q = pieces.take(kBlockM * plan.n_padded);
    q_transposed = pieces.take(kBlockM * plan.n_padded);
    dout = pieces.take(kBlockM * plan.n_padded);
    dout_transposed = pieces.take(kBlockM * plan.n_padded);
    weights = pieces.take(kBlockN * kBlockM);
    dscores = pieces.take(kBlockN * kBlockM);
    dq = pieces.take(kBlockM * plan.n_padded);
    lse = pieces.take(kBlockM);
    delta = pieces.take(kBlockM);
    floats = pieces.used;
  }
};

// Copies the rows of a block of queries: q and dout both ways round, lse and delta.
template <class T>
static void attention_backward_load(const AttentionBackwardArgs& a, const AttentionBackwardWorkspace& w,
                                    int64_t n_padded, int64_t batch, int64_t head, const QueryBlock& block) {
  const AttentionSizes& s = a.sizes;
  const int64_t padded_rows = block.padded_rows();
  const T* q = head_rows<const T>(a.q, batch, head) + block.first * a.q.row_stride;
  const T* dout = head_rows<const T>(a.dout, batch, head) + block.first * a.dout.row_stride;
  const T* out = head_rows<const T>(a.out, batch, head) + block.first * a.out.row_stride;
  const float* lse = a.lse + (batch * s.n_heads + head) * s.q_len + block.first;
  pack_rows(w.q, q, a.q.row_stride, block.rows, padded_rows, s.head_dim, n_padded);
  transpose_rows(w.q_transposed, kBlockM, w.q, padded_rows, n_padded);
  pack_rows(w.dout, dout, a.dout.row_stride, block.rows, padded_rows, s.head_dim, n_padded,
            dropout_scale(a.dropout_threshold));
  transpose_rows(w.dout_transposed, kBlockM, w.dout, padded_rows, n_padded);
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
template <bool kDropout>
FASTGPT_INLINE void attention_softmax_backward(const AttentionBackwardWorkspace& w, const Tile& tile, int64_t row,
                                               const Dropout& dropout, VecU queries) {
  hide_scores(w.weights, tile, row);
  const VecF lse = load(w.lse + row), delta = load(w.delta + row);
  for_keys<kDropout>(dropout, queries, tile.first_key, tile.computed(row), [&](int64_t j, VecI keep) {
    float *weights = w.weights + j * kBlockM + row, *dscores = w.dscores + j * kBlockM + row;
    const VecF p = exp2(load(weights) - lse);
    const VecF dp = (VecF)((VecI)load(dscores) & keep);
    store(weights, (VecF)((VecI)p & keep));
    store(dscores, p * (dp - delta));
  });
}

// dv += weights dout, dk += dscores q, dq += dscores^T k, each over the part of the tile that is not hidden.
static void attention_backward_accumulate(const AttentionBackwardWorkspace& w, const Tile& tile, int64_t rows,
                                          int64_t n_padded) {
  const int64_t vectors = n_padded / kLanes;
  float *dk = w.dk + tile.first_key * n_padded, *dv = w.dv + tile.first_key * n_padded;
  for (int64_t j = 0; j < tile.keys; j += kMr) {
    const int64_t row = tile.first_vector(j) * kLanes;
    if (row >= rows) break;
    for_vector_groups(0, vectors, [&](int64_t v, auto count) {
      const int64_t n = v * kLanes;
      add_product<count, Layout::kRows>(dv + j * n_padded + n, n_padded, w.weights + j * kBlockM + row, kBlockM,
                                        w.dout + row * n_padded + n, n_padded, rows - row, nullptr);
      add_product<count, Layout::kRows>(dk + j * n_padded + n, n_padded, w.dscores + j * kBlockM + row, kBlockM,
                                        w.q + row * n_padded + n, n_padded, rows - row, nullptr);
    });
  }
  const float* k = w.k + tile.first_key * n_padded;
  for (int64_t row = 0; row < rows; row += kMr) {
    const int64_t keys = tile.visible(row + kMr - 1);
    if (keys == 0) continue;
    for_vector_groups(0, vectors, [&](int64_t v, auto count) {
      add_product<count, Layout::kColumns>(w.dq + row * n_padded + v * kLanes, n_padded, w.dscores + row, kBlockM,
                                           k + v * kLanes, n_padded, keys, nullptr);
    });
  }
}

template <class T, bool kDropout>
static void attention_backward_block(const AttentionBackwardArgs& a, const AttentionBackwardWorkspace& w,
                                     int64_t n_padded, int64_t batch, int64_t head, const QueryBlock& block) {
  const AttentionSizes& s = a.sizes;
  const int64_t padded_rows = block.padded_rows();
  attention_backward_load<T>(a, w, n_padded, batch, head, block);
  const Dropout dropout = dropout_of(a, batch * s.n_heads + head);
  for (int64_t first_key = 0; first_key < block.keys(); first_key += kBlockN) {
    const Tile tile = block.tile(first_key);
    tile_scores(w.weights, tile, padded_rows, w.k + first_key * n_padded, w.q_transposed, s.head_dim, n_padded,
                a.softmax_scale * kLog2E);
    tile_scores(w.dscores, tile, padded_rows, w.v + first_key * n_padded, w.dout_transposed, s.head_dim, n_padded,
                1.0f);
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
              [](int64_t) { return 1.0f; });
}

template <class T, bool kDropout>
static void attention_backward_kernel(const AttentionBackwardArgs& a) {
  const AttentionSizes& s = a.sizes;
  const Plan plan(s, a.num_threads);
  const int64_t floats = AttentionBackwardWorkspace(plan, nullptr).floats;
  const int64_t head_floats = plan.k_padded * plan.n_padded;
  float* sums = a.workspace + floats * plan.threads;
  parallel_items(plan.items, plan.threads, [&](int64_t item, int thread) {
    AttentionBackwardWorkspace w(plan, a.workspace + thread * floats);
    w.dk = sums + 2 * head_floats * (plan.parts == 1 ? thread : item);
    w.dv = w.dk + head_floats;
    memset(w.dk, 0, sizeof(float) * 2 * head_floats);
    const int64_t batch = item / plan.parts / s.n_heads, head = item / plan.parts % s.n_heads;
    pack_rows(w.k, head_rows<const T>(a.k, batch, head), a.k.row_stride, s.k_len, plan.k_padded, s.head_dim,
              plan.n_padded);
    pack_rows(w.v, head_rows<const T>(a.v, batch, head), a.v.row_stride, s.k_len, plan.k_padded, s.head_dim,
              plan.n_padded);
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

static int64_t attention_backward_floats(const AttentionSizes& sizes, int num_threads) {
  const Plan plan(sizes, num_threads);
  const int64_t sums = plan.parts == 1 ? plan.threads : plan.items;
  return plan.threads * AttentionBackwardWorkspace(plan, nullptr).floats + sums * 2 * plan.k_padded * plan.n_padded;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
