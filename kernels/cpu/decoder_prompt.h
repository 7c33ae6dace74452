// Attention of prompts in a step of the decoder: runs of entries at consecutive positions of one row, by the tiles of
// attention_forward.h, over keys and values that already lie in the cache.
//
// Work: a thread has its own heads. Of each run it copies the head's keys and values into its workspace as float32, and
// goes through the run in blocks of queries. A query adds its keys in their order, whatever the other queries of its
// block are: cutting a prompt into other pieces gives the same bits.
// Bytes: each key and value of the row once a run and head.
//
// Measured on 2 cores of an AMD EPYC (Zen 3), GPT-2 124M, 512 tokens, against a query at a time and a whole last layer:
// int8 453 -> 383 ms, bfloat16 593 -> 510 ms; 1,024 tokens on one thread, int8, 1.32 times as fast.
#pragma once

#include "attention_forward.h"
#include "decode_attention.h"
#include "decoder_args.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// What a thread works with, for rows of up to `keys` keys.
static AttentionForwardWorkspace<float> prompt_workspace(const DecoderModel& model, int64_t keys, float* base) {
  return AttentionForwardWorkspace<float>(round_up(keys, kMr), round_up(model.head_dim, kLanes), base);
}

// Calls body(first entry, number of entries) for all runs.
template <class Body>
FASTGPT_INLINE void for_runs(const DecoderStepArgs& a, Body body) {
  for (int64_t first = 0, end = 1; first < a.count; first = end++) {
    while (end < a.count && a.rows[end] == a.rows[first] && a.positions[end] == a.positions[end - 1] + 1) ++end;
    body(first, end - first);
  }
}

// Keys or values of the cache as float32.
template <class T>
static void unpack_cached(float* to, const T* x, int64_t keys, int64_t head_dim, int64_t n_padded) {
  const int64_t stride = cache_stride<T>(head_dim);
  pack_rows(to, x, stride, keys, round_up(keys, kMr), head_dim, n_padded);
  if constexpr (std::is_same_v<T, int8_t>)
    for (int64_t j = 0; j < keys; ++j) {
      float scale;
      memcpy(&scale, x + j * stride + head_dim, sizeof scale);
      for (int64_t i = 0; i < n_padded; i += kLanes) store(to + j * n_padded + i, load(to + j * n_padded + i) * scale);
    }
}

// One head of a run. q, out: (n_queries, stride); k, v: as they lie in the cache, the queries being the last of them.
template <class T>
static void attend_run(const AttentionForwardWorkspace<float>& w, float* out, const float* q, const T* k, const T* v,
                       int64_t n_queries, int64_t keys, int64_t head_dim, int64_t stride) {
  const int64_t n_padded = round_up(head_dim, kLanes);
  unpack_cached(w.k, k, keys, head_dim, n_padded);
  unpack_cached(w.v, v, keys, head_dim, n_padded);
  const float softmax_scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int64_t number = 0; number * kBlockM < n_queries; ++number) {
    const QueryBlock block(number, n_queries, keys);
    pack_rows(w.q, q + block.first * stride, stride, block.rows, block.padded_rows(), head_dim, n_padded);
    attention_forward_tiles<false>(w, block, head_dim, n_padded, softmax_scale, Dropout(0, 0, 0));
    unpack_rows(out + block.first * stride, stride, w.acc, block.rows, head_dim, n_padded,
                [&](int64_t row) { return 1.0f / w.l[row]; });
  }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
