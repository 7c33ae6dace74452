// Forward of causal attention; see attention.h.
#pragma once

#include <cmath>

#include "attention_tile.h"

namespace fastgpt {
namespace FASTGPT_ISA {

template <class Step>
struct AttentionForwardWorkspace {
  int64_t ld;              // the length of rows of steps
  Step* k;                 // (k_padded, ld): the keys of a head
  Step* v;                 // (k_padded / kPerStep, n_padded): the values, keys making the steps
  Step *q, *q_transposed;  // (kBlockM, ld), (ld, kBlockM)
  float* scores;           // (kBlockN, kBlockM): scores of one tile, and the weights that are written over them
  float* acc;              // (kBlockM, n_padded): the output before it is divided by l
  float *m, *l, *rescale;  // (kBlockM): running maximum and sum of a row, and what a tile multiplies acc by
  int64_t floats;

  AttentionForwardWorkspace(int64_t k_padded, int64_t n_padded, float* base) : ld(row_steps<Step>(n_padded)) {
    Pieces pieces{base};
    k = pieces.take<Step>(k_padded * ld);
    v = pieces.take<Step>(k_padded / kPerStep<Step> * n_padded);
    q = pieces.take<Step>(kBlockM * ld);
    q_transposed = pieces.take<Step>(kBlockM * ld);
    scores = pieces.take(kBlockN * kBlockM);
    acc = pieces.take(kBlockM * n_padded);
    m = pieces.take(kBlockM);
    l = pieces.take(kBlockM);
    rescale = pieces.take(kBlockM);
    floats = pieces.used;
  }
};

// Turns the scores of one vector of rows into unnormalised weights 2^(s - m), and moves m and l on. Weights of two keys
// that make a step are written over the first one's scores.
template <bool kDropout, class Step>
FASTGPT_INLINE void attention_softmax(const AttentionForwardWorkspace<Step>& w, const Tile& tile, int64_t row,
                                      const Dropout& dropout, VecU queries) {
  constexpr int kKeys = kPerStep<Step>;
  float* s = w.scores + row;
  const int64_t n = tile.computed(row);
  hide_scores(w.scores, tile, row);
  const VecF m_old = load(w.m + row);
  VecF m = m_old, m_odd = m_old;
  for (int64_t j = 0; j < n; j += 2) {
    m = max(m, load(s + j * kBlockM));
    m_odd = max(m_odd, load(s + (j + 1) * kBlockM));
  }
  m = max(m, m_odd);
  const VecF rescale = exp2(m_old - m);
  VecF l = load(w.l + row) * rescale;
  for_keys<kDropout, kKeys>(dropout, queries, tile.first_key, n, [&](int64_t j, const VecI(&keep)[kKeys]) {
    VecF p[kKeys];
#pragma GCC unroll 2
    for (int i = 0; i < kKeys; ++i) {
      p[i] = exp2(load(s + (j + i) * kBlockM) - m);
      // The sum is that of the softmax, before dropout and in float32.
      l += p[i];
      p[i] = (VecF)((VecI)p[i] & keep[i]);
    }
    store(reinterpret_cast<Step*>(s + j * kBlockM), make_step(p));
  });
  store(w.m + row, m);
  store(w.l + row, l);
  store(w.rescale + row, rescale);
}

// acc = rescale * acc + weights^T V, kMr rows at a time, each with the keys that its last row sees.
template <class Step>
static void attention_accumulate(const AttentionForwardWorkspace<Step>& w, const Tile& tile, int64_t rows,
                                 int64_t n_padded) {
  constexpr int kKeys = kPerStep<Step>;
  const Step *weights = reinterpret_cast<Step*>(w.scores), *v = w.v + tile.first_key / kKeys * n_padded;
  for (int64_t row = 0; row < rows; row += kMr) {
    const int64_t keys = tile.visible(row + kMr - 1);
    if (keys == 0) continue;
    for_vector_groups(0, n_padded / kLanes, [&](int64_t vector, auto count) {
      const int64_t n = vector * kLanes;
      add_product<count, Layout::kColumns>(w.acc + row * n_padded + n, n_padded, weights + row, kKeys * kBlockM, v + n,
                                           n_padded, steps_of<Step>(keys), w.rescale + row);
    });
  }
}

// From the queries of a block in w.q, and keys and values in w.k and w.v, to acc, m and l.
template <bool kDropout, class Step>
static void attention_forward_tiles(const AttentionForwardWorkspace<Step>& w, const QueryBlock& block, int64_t head_dim,
                                    int64_t n_padded, float softmax_scale, const Dropout& dropout) {
  const int64_t padded_rows = block.padded_rows();
  transpose_rows(w.q_transposed, kBlockM, w.q, padded_rows, w.ld);
  memset(w.acc, 0, sizeof(float) * padded_rows * n_padded);
  for (int64_t row = 0; row < padded_rows; row += kLanes) {
    store(w.m + row, splat(-__builtin_inff()));
    store(w.l + row, VecF{});
  }
  for (int64_t first_key = 0; first_key < block.keys(); first_key += kBlockN) {
    const Tile tile = block.tile(first_key);
    tile_scores(w.scores, tile, padded_rows, w.k + first_key * w.ld, w.ld, w.q_transposed, steps_of<Step>(head_dim),
                softmax_scale * kLog2E);
    for (int64_t row = 0; row < padded_rows; row += kLanes) {
      const VecU queries = (VecU)lane_numbers() + static_cast<uint32_t>(block.first + row);
      if (tile.computed(row) > 0) attention_softmax<kDropout>(w, tile, row, dropout, queries);
    }
    attention_accumulate(w, tile, block.rows, n_padded);
  }
}

template <class T, bool kDropout>
static void attention_forward_block(const AttentionForwardArgs& a, const AttentionForwardWorkspace<StepOf<T>>& w,
                                    int64_t n_padded, int64_t batch, int64_t head, const QueryBlock& block) {
  const AttentionSizes& s = a.sizes;
  const T* q = head_rows<const T>(a.q, batch, head) + block.first * a.q.row_stride;
  pack_rows(w.q, q, a.q.row_stride, block.rows, block.padded_rows(), s.head_dim, w.ld);
  attention_forward_tiles<kDropout>(w, block, s.head_dim, n_padded, a.softmax_scale,
                                    dropout_of(a, batch * s.n_heads + head));
  const float kept = dropout_scale(a.dropout_threshold);
  T* out = head_rows<T>(a.out, batch, head) + block.first * a.out.row_stride;
  unpack_rows(out, a.out.row_stride, w.acc, block.rows, s.head_dim, n_padded,
              [&](int64_t row) { return kept / w.l[row]; });
  float* lse = a.lse + (batch * s.n_heads + head) * s.q_len + block.first;
  for (int64_t row = 0; row < block.rows; ++row) {
    lse[row] = static_cast<float>(w.m[row] * kLn2 + std::log(w.l[row]));
  }
}

template <class T, bool kDropout>
static void attention_forward_kernel(const AttentionForwardArgs& a) {
  const AttentionSizes& s = a.sizes;
  const Plan plan(s, a.num_threads);
  using Workspace = AttentionForwardWorkspace<StepOf<T>>;
  const int64_t floats = Workspace(plan.k_padded, plan.n_padded, nullptr).floats;
  parallel_items(plan.items, plan.threads, [&](int64_t item, int thread) {
    const Workspace w(plan.k_padded, plan.n_padded, a.workspace + thread * floats);
    const int64_t batch = item / plan.parts / s.n_heads, head = item / plan.parts % s.n_heads;
    pack_rows(w.k, head_rows<const T>(a.k, batch, head), a.k.row_stride, s.k_len, plan.k_padded, s.head_dim, w.ld);
    pack_row_steps(w.v, head_rows<const T>(a.v, batch, head), a.v.row_stride, s.k_len, plan.k_padded, s.head_dim,
                   plan.n_padded);
    for (int64_t block = plan.q_blocks - 1 - item % plan.parts; block >= 0; block -= plan.parts) {
      attention_forward_block<T, kDropout>(a, w, plan.n_padded, batch, head, QueryBlock(block, s.q_len, s.k_len));
    }
  });
}

static void attention_forward(const AttentionForwardArgs& a) {
  with_kernel_types(a, [&](auto t, auto dropout) { attention_forward_kernel<decltype(t), dropout>(a); });
}

static int64_t attention_forward_floats(const AttentionSizes& sizes, DType dtype, int num_threads) {
  const Plan plan(sizes, num_threads);
  return with_step(dtype, [&](auto step) {
    return plan.threads * AttentionForwardWorkspace<decltype(step)>(plan.k_padded, plan.n_padded, nullptr).floats;
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
