// Attention of one new query per row over a key-value cache, of which each row fills its own length.
//
//   out = sum_j p_j v_j / sum_j p_j,  p_j = e^(s_j - m),  s_j = softmax_scale * q . k_j,  m = max_j s_j,  j < length
//
// Work: the keys of all heads are cut into blocks of 64, and the threads share all blocks of all heads evenly, whatever
// the batch, the heads and the lengths are. Over its blocks of one head a thread keeps m, l = sum p_j and
// acc = sum p_j v_j, and rescales l and acc when m grows (online softmax). A head that two or more threads share leaves
// their (m, l, acc) in `partial`; they are joined in the order of the threads, so a run with the same number of threads
// gives the same bits. Everything is added in float32.
//
//   4 heads of 5 blocks, 2 threads:   [0 0 0 0 0][1 1 1 1 1] | [2 2 2 2 2][3 3 3 3 3]
//   1 head of 5 blocks, 2 threads:    [0 0 | 0 0 0], two partial results
//
// Bytes: each key and value once. What lies in the cache behind a row's length is never read: it may be NaN.
// Measured on one core of an AMD EPYC (Zen 3), head_dim 64, float32, ns a key and query at 64, 512 and 1000 keys:
//   one key's sum added across the lanes at a time                  8.9, 8.9, 9.4
//   as many keys as lanes, added across together (now)              5.7, 6.4, 7.7: then the second level of cache
// 1,000 keys of many heads in memory, float32, bfloat16, int8: 30, 17, 12.6; int8 with rows fetched 64 ahead 9.8 (now),
// in blocks of 128 keys 12.2. Fetched ahead, float32 and bfloat16 get slower (39, 18).
// Papers: Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "Flash-Decoding", 2023.
#pragma once

#include <type_traits>

#include "parallel.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int64_t kDecodeBlock = 64;

// Calls body for the panels of a head: as many vectors as fit of 8, 4, 2 and 1, then the tail. A panel's vectors stay
// in registers while keys or values stream by.
template <int N>
struct Panel {
  static constexpr int kVectors = N;
};

// The lanes of whole vectors: a constant, without which every load would ask whether it is one.
using Full = std::integral_constant<int64_t, kLanes>;

template <class Body>
FASTGPT_INLINE void for_panels(int64_t head_dim, Body body) {
  int64_t d = 0;
  for (; d + 8 * kLanes <= head_dim; d += 8 * kLanes) body(Panel<8>(), d, Full());
  if (d + 4 * kLanes <= head_dim) body(Panel<4>(), d, Full()), d += 4 * kLanes;
  if (d + 2 * kLanes <= head_dim) body(Panel<2>(), d, Full()), d += 2 * kLanes;
  if (d + kLanes <= head_dim) body(Panel<1>(), d, Full()), d += kLanes;
  if (d < head_dim) body(Panel<1>(), d, head_dim - d);
}

// What one thread knows of one head.
struct DecodeState {
  float m, l;
  float acc[kMaxHeadDim];
};

// What exponents are taken relative to. While every score is -inf that is 0, so that their weights are 0 and not NaN.
FASTGPT_INLINE float exponent_base(float m) { return m == -__builtin_inff() ? 0.0f : m; }

FASTGPT_INLINE float exp_of(float x) { return exp(splat(x))[0]; }

// Rows of 8 bits are done with before the processor has looked ahead far enough by itself.
template <class T>
FASTGPT_INLINE void fetch_ahead(const T* row, int64_t stride) {
  if constexpr (std::is_same_v<T, int8_t>) __builtin_prefetch(row + kDecodeBlock * stride);
}

// scores[j] += q . k_j over one panel; lanes is kLanes, or the length of the head's tail. As many keys at a time as
// there are lanes, so that their sums are added across the lanes together.
template <int N, class T, class Lanes>
FASTGPT_INLINE void add_scores(float* scores, const float* q, const T* k, int64_t keys, int64_t stride, Lanes lanes) {
  int64_t j = 0;
  for (; j + kLanes <= keys; j += kLanes, k += kLanes * stride) {
    VecF sums[kLanes] = {};
#pragma GCC unroll 16
    for (int key = 0; key < kLanes; ++key) fetch_ahead(k + key * stride, stride);
    for (int n = 0; n < N; ++n) {
      const VecF part = load_lanes(q + n * kLanes, lanes);
#pragma GCC unroll 16
      for (int key = 0; key < kLanes; ++key) sums[key] += part * load_lanes(k + key * stride + n * kLanes, lanes);
    }
    store(scores + j, load(scores + j) + sum_rows(sums));
  }
  for (; j < keys; ++j, k += stride) {
    VecF sum = {};
    for (int n = 0; n < N; ++n) sum += load_lanes(q + n * kLanes, lanes) * load_lanes(k + n * kLanes, lanes);
    scores[j] += reduce_add(sum);
  }
}

// acc = acc * rescale + sum_j p_j v_j over one panel.
template <int N, class T, class Lanes>
FASTGPT_INLINE void add_values(float* acc, float rescale, const float* p, const T* v, int64_t keys, int64_t stride,
                               Lanes lanes) {
  VecF sum[N];
  for (int n = 0; n < N; ++n) sum[n] = load_lanes(acc + n * kLanes, lanes) * rescale;
  for (int64_t j = 0; j < keys; ++j, v += stride) {
    fetch_ahead(v, stride);
    for (int n = 0; n < N; ++n) sum[n] += p[j] * load_lanes(v + n * kLanes, lanes);
  }
  for (int n = 0; n < N; ++n) store_lanes(acc + n * kLanes, sum[n], lanes);
}

// From one token's keys to the next one's in a cache.
template <class T>
FASTGPT_INLINE int64_t cache_stride(int64_t head_dim) {
  return head_dim + (std::is_same_v<T, int8_t> ? kCacheScaleBytes : 0);
}

// x[j] *= the scale of row j, which stands behind its numbers where these are of 8 bits.
template <class T>
FASTGPT_INLINE void apply_scales(float* x, const T* rows, int64_t count, int64_t stride, int64_t head_dim) {
  if constexpr (std::is_same_v<T, int8_t>)
    for (int64_t j = 0; j < count; ++j) {
      float scale;
      memcpy(&scale, rows + j * stride + head_dim, sizeof scale);
      x[j] *= scale;
    }
}

// Takes one block of keys into the state.
template <class T>
static void decode_block(const DecodeAttentionArgs& a, DecodeState& state, const float* q, const T* k, const T* v,
                         int64_t keys) {
  // The lanes past the last key: -inf has weight 0.
  float scores[kDecodeBlock], p[kDecodeBlock];
  for (int64_t j = 0; j < kDecodeBlock; ++j) scores[j] = j < keys ? 0.0f : -__builtin_inff();
  for_panels(a.head_dim, [&](auto panel, int64_t d, auto lanes) {
    add_scores<decltype(panel)::kVectors>(scores, q + d, k + d, keys, a.k_strides[2], lanes);
  });
  apply_scales(scores, k, keys, a.k_strides[2], a.head_dim);
  VecF largest = splat(state.m);
  for (int64_t i = 0; i < kDecodeBlock; i += kLanes) largest = max(largest, load(scores + i));
  const float largest_now = reduce_max(largest), m = exponent_base(largest_now);
  const float rescale = exp_of(state.m - m);
  VecF sum = {};
  for (int64_t i = 0; i < kDecodeBlock; i += kLanes) {
    const VecF weight = exp(load(scores + i) - m);
    store(p + i, weight);
    sum += weight;
  }
  state.l = state.l * rescale + reduce_add(sum);
  state.m = largest_now;
  apply_scales(p, v, keys, a.v_strides[2], a.head_dim);
  for_panels(a.head_dim, [&](auto panel, int64_t d, auto lanes) {
    add_values<decltype(panel)::kVectors>(state.acc + d, rescale, p, v + d, keys, a.v_strides[2], lanes);
  });
}

// Keys begin .. end of one head, into a fresh state. The query may be of another type than keys and values.
template <class T, class Q = T>
static void decode_keys(const DecodeAttentionArgs& a, DecodeState& state, int64_t row, int64_t head, int64_t begin,
                        int64_t end) {
  const Q* q = static_cast<const Q*>(a.q) + row * a.q_strides[0] + head * a.q_strides[1];
  const T* k = static_cast<const T*>(a.k) + row * a.k_strides[0] + head * a.k_strides[1];
  const T* v = static_cast<const T*>(a.v) + row * a.v_strides[0] + head * a.v_strides[1];
  float scaled[kMaxHeadDim];
  for_lanes(a.head_dim, [&](int64_t i, int64_t c) {
    store_lanes(scaled + i, load_lanes(q + i, c) * a.softmax_scale, c);
    store_lanes(state.acc + i, VecF{}, c);
  });
  state.m = -__builtin_inff();
  state.l = 0.0f;
  for (int64_t j = begin; j < end; j += kDecodeBlock)
    decode_block(a, state, scaled, k + j * a.k_strides[2], v + j * a.v_strides[2], min(end - j, kDecodeBlock));
}

// Adds what another thread knows of the same head, from (m, l, acc).
static inline void join(DecodeState& state, const float* other, int64_t head_dim) {
  const float largest = state.m < other[0] ? other[0] : state.m, m = exponent_base(largest);
  const float scale = exp_of(state.m - m), other_scale = exp_of(other[0] - m);
  state.m = largest;
  state.l = state.l * scale + other[1] * other_scale;
  for_lanes(head_dim, [&](int64_t i, int64_t c) {
    store_lanes(state.acc + i, load_lanes(state.acc + i, c) * scale + load_lanes(other + 2 + i, c) * other_scale, c);
  });
}

template <class T>
static void write_out(const DecodeAttentionArgs& a, const DecodeState& state, int64_t row_head) {
  T* out = static_cast<T*>(a.out) + row_head * a.head_dim;
  for_lanes(a.head_dim, [&](int64_t i, int64_t c) { store_lanes(out + i, load_lanes(state.acc + i, c) / state.l, c); });
}

static inline int64_t decode_blocks(int64_t length) { return (length + kDecodeBlock - 1) / kDecodeBlock; }

// Blocks begin .. end of all blocks; `slot` is the thread's two places in `partial`: its first head and its last may be
// shared with its neighbours.
template <class T>
static void decode_range(const DecodeAttentionArgs& a, int64_t begin, int64_t end, int64_t slot) {
  int64_t row = 0, first = 0;  // the row's first block
  while (first + a.n_heads * decode_blocks(a.lengths[row]) <= begin)
    first += a.n_heads * decode_blocks(a.lengths[row++]);
  DecodeState state;
  for (int64_t block = begin; block < end;) {
    const int64_t blocks = decode_blocks(a.lengths[row]);
    const int64_t head = (block - first) / blocks, head_first = first + head * blocks;
    const int64_t stop = min(end, head_first + blocks);
    decode_keys<T>(a, state, row, head, (block - head_first) * kDecodeBlock,
                   min(a.lengths[row], (stop - head_first) * kDecodeBlock));
    if (block == head_first && stop == head_first + blocks) {
      write_out<T>(a, state, row * a.n_heads + head);
    } else {
      float* place = a.partial + slot * (a.head_dim + 2);
      place[0] = state.m;
      place[1] = state.l;
      memcpy(place + 2, state.acc, a.head_dim * sizeof(float));
      a.partial_head[slot++] = row * a.n_heads + head;
    }
    block = stop;
    if (head + 1 == a.n_heads && stop == head_first + blocks) first = stop, ++row;
  }
}

// Joins the partial results, which lie in the order of the heads.
template <class T>
static void decode_join(const DecodeAttentionArgs& a, int64_t slots) {
  DecodeState state;
  for (int64_t slot = 0; slot < slots;) {
    const int64_t row_head = a.partial_head[slot];
    const float* place = a.partial + slot++ * (a.head_dim + 2);
    if (row_head < 0) continue;
    state.m = place[0];
    state.l = place[1];
    memcpy(state.acc, place + 2, a.head_dim * sizeof(float));
    for (; slot < slots && (a.partial_head[slot] == row_head || a.partial_head[slot] < 0); ++slot)
      if (a.partial_head[slot] == row_head) join(state, a.partial + slot * (a.head_dim + 2), a.head_dim);
    write_out<T>(a, state, row_head);
  }
}

template <class T>
static void decode_attention_kernel(const DecodeAttentionArgs& a) {
  int64_t blocks = 0;
  for (int64_t row = 0; row < a.batch; ++row) blocks += a.n_heads * decode_blocks(a.lengths[row]);
  const int threads = threads_for(blocks * kDecodeBlock * a.head_dim, 16384, a.num_threads);
  for (int slot = 0; slot < 2 * threads; ++slot) a.partial_head[slot] = -1;
  parallel_ranges(blocks, threads,
                  [&](int64_t begin, int64_t end, int thread) { decode_range<T>(a, begin, end, 2 * thread); });
  decode_join<T>(a, 2 * threads);
}

static void decode_attention(const DecodeAttentionArgs& a) {
  a.dtype == DType::kFloat32 ? decode_attention_kernel<float>(a) : decode_attention_kernel<Bf16>(a);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
