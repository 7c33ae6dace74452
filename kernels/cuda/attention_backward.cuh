// Causal attention, backward. With p the weights (drawn again from lse), m the dropout mask times its scale:
//
//   dv = (p m)^T dout     ds = p (m (dout v^T) - delta)     dq = scale ds k     dk = scale ds^T q     delta = sum(dout
//   out)
//
// Two passes, seven products where one pass would need five: the first owns queries (q k^T, dout v^T, ds k) and leaves
// delta behind, the second owns keys (k q^T, v dout^T, p^T dout, ds^T q). So nothing is added up by atomics, the result
// does not depend on timing, and dq needs no float32 buffer. In both passes p and ds go from accumulators into the left
// factor of the next product: they never see shared memory. The second pass holds the scores transposed, where a lane's
// eight slots of one Philox draw belong to four warps: each thread draws a few (query, key % 8) for all, one byte each.
// Bytes: the first pass reads q, dout, out once and k, v for each block of queries; the second k, v once and q, dout
// for each block of keys. At head_dim 128 with dropout, blocks of 16: those of 32 spill 16 bytes. 14 head_dim
// operations for each visible (query, key). float32 sums; p and ds rounded to 16 bits. Paper: Dao, "FlashAttention-2",
// 2023.
#pragma once

#include "attention_tile.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kBackwardWarps = 4;
constexpr int kBackwardThreads = kBackwardWarps * kWarp;
constexpr int kBlock = 16 * kBackwardWarps;  // queries of a block in the first pass, keys in the second

template <class T>
struct BackwardInputs {
  Heads<const T> dout, q, k, v;
};

// ---- first pass

template <int kD, bool kDropout>
struct QueriesTile {
  // At head_dim 128 the sums of dq leave registers for half as many keys, and beside Philox for a quarter.
  static constexpr int kKeys = kD == 64 ? 64 : kDropout ? 16 : 32;
  static constexpr size_t kSharedBytes = (2 * kBlock + 4 * kKeys) * kD * 2;
};

template <class T, int kD, bool kDropout>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    attention_backward_dq_kernel(Heads<T> dq, float* delta, BackwardInputs<T> in, Heads<const T> out, const float* lse,
                                 AttentionSizes sizes, Dropout dropout) {
  constexpr int kKeys = QueriesTile<kD, kDropout>::kKeys;
  T* q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* dout_tile = q_tile + kBlock * kD;
  T* k_tiles = dout_tile + kBlock * kD;
  T* v_tiles = k_tiles + 2 * kKeys * kD;

  const int64_t heads = sizes.batch * sizes.n_heads;
  const int64_t head = blockIdx.x % heads, batch = head / sizes.n_heads, h = head % sizes.n_heads;
  const int first = ((sizes.q_len + kBlock - 1) / kBlock - 1 - static_cast<int>(blockIdx.x / heads)) * kBlock;
  const int offset = sizes.k_len - sizes.q_len;
  const int full = (first + offset + 1) / kKeys;
  const int all = (min(first + kBlock, sizes.q_len) + offset + kKeys - 1) / kKeys;
  const T *k_head = in.k.head(batch, h), *v_head = in.v.head(batch, h), *dout_head = in.dout.head(batch, h);
  const auto copy_block = [&](int block) {
    const int stage = static_cast<int>(block % 2) * kKeys * kD;
    copy_rows<T, kD, kKeys, kBackwardThreads>(k_tiles + stage, k_head, in.k.row_stride, block * kKeys, sizes.k_len,
                                              sizes.head_dim);
    copy_rows<T, kD, kKeys, kBackwardThreads>(v_tiles + stage, v_head, in.v.row_stride, block * kKeys, sizes.k_len,
                                              sizes.head_dim);
  };
  copy_rows<T, kD, kBlock, kBackwardThreads>(q_tile, in.q.head(batch, h), in.q.row_stride, first, sizes.q_len,
                                             sizes.head_dim);
  copy_rows<T, kD, kBlock, kBackwardThreads>(dout_tile, dout_head, in.dout.row_stride, first, sizes.q_len,
                                             sizes.head_dim);
  copy_block(0);
  copy_async_commit();

  const int lane = threadIdx.x % kWarp, warp_row = static_cast<int>(threadIdx.x) / kWarp * 16;
  const int row = first + warp_row + lane / 4;
  const float scale2 = sizes.scale * kLog2E;
  // Rows that do not exist weigh nothing.
  float lse2[2] = {INFINITY, INFINITY}, row_delta[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int i = row + half * 8;
    // All four lanes of a row come to its shuffles, whether the row exists or not.
    const int safe = min(i, sizes.q_len - 1);
    const float d = row_product<kD>(dout_head + static_cast<int64_t>(safe) * in.dout.row_stride,
                                    out.head(batch, h) + static_cast<int64_t>(safe) * out.row_stride, sizes.head_dim);
    if (i >= sizes.q_len) continue;
    row_delta[half] = d;
    lse2[half] = lse[head * sizes.q_len + i] * kLog2E;
    if (lane % 4 == 0) delta[head * sizes.q_len + i] = d;
  }

  float sums[1][kD / 8][4] = {};
  const auto step = [&](int block, auto masked) {
    copy_async_wait<0>();
    __syncthreads();
    if (block + 1 < all) copy_block(block + 1);
    copy_async_commit();
    T *k_tile = k_tiles + block % 2 * kKeys * kD, *v_tile = v_tiles + block % 2 * kKeys * kD;
    const int column0 = lane % 4 * 2;
    uint32_t kept[2];  // of the 64 keys to which this block belongs
    const int slot = block * kKeys % 64 / 8;
    if (kDropout) dropout.keep_rows<1>(kept, block * kKeys / 64 * 8 + column0, row, static_cast<uint32_t>(head));
    float scores[1][kKeys / 8][4] = {}, dweights[1][kKeys / 8][4] = {};
    multiply_by_rows<T, kD, kKeys>(scores, k_tile,
                                   [&](uint32_t (&a)[4], int, int i) { load_left<T, kD>(a, q_tile, warp_row, i); });
    multiply_by_rows<T, kD, kKeys>(dweights, v_tile,
                                   [&](uint32_t (&a)[4], int, int i) { load_left<T, kD>(a, dout_tile, warp_row, i); });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int seen = row + half * 8 + offset - block * kKeys - column0;
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          float& score = scores[0][n][half * 2 + e];
          float dweight = dweights[0][n][half * 2 + e];
          if (kDropout) dweight = kept[half] >> (slot + e * 8 + n) & 1 ? dweight * dropout.scale : 0.0f;
          const float weight = fast_exp2(score * scale2 - lse2[half]);
          score = weight * (dweight - row_delta[half]);
          if (decltype(masked)::value && n * 8 + e > seen) score = 0.0f;
        }
    }
    multiply_by_columns<T, kD, kKeys>(sums, scores, k_tile);
  };
  int block = 0;
  for (; block < full; ++block) step(block, Constant<false>{});
  for (; block < all; ++block) step(block, Constant<true>{});
  copy_async_wait<0>();
  store_rows<T, kD>(dq.head(batch, h), dq.row_stride, row, sizes.q_len, sizes.head_dim, sums[0], sizes.scale,
                    sizes.scale);
}

// ---- second pass

template <int kD, bool kDropout>
struct KeysTile {
  // At head_dim 128 the sums of dk and dv leave registers for half as many queries, and beside the mask for a quarter.
  static constexpr int kQueries = kD == 64 ? 64 : kDropout ? 16 : 32;
  static constexpr int kTiles = (2 * kBlock + 4 * kQueries) * kD * 2;
  // lse and delta, then a byte of the mask for each query and key % 8, all twice.
  static constexpr size_t kSharedBytes = kTiles + 2 * kQueries * (2 * sizeof(float) + 8);
};

template <class T, int kD, bool kDropout>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    attention_backward_dkdv_kernel(Heads<T> dk, Heads<T> dv, BackwardInputs<T> in, const float* lse, const float* delta,
                                   AttentionSizes sizes, Dropout dropout) {
  constexpr int kQueries = KeysTile<kD, kDropout>::kQueries;
  T* k_tile = reinterpret_cast<T*>(dynamic_shared());
  T* v_tile = k_tile + kBlock * kD;
  T* q_tiles = v_tile + kBlock * kD;
  T* dout_tiles = q_tiles + 2 * kQueries * kD;
  float* statistics =
      reinterpret_cast<float*>(dynamic_shared() + KeysTile<kD, kDropout>::kTiles);  // (2, lse and delta, kQueries)
  uint32_t* masks = reinterpret_cast<uint32_t*>(statistics + 4 * kQueries);         // (2, kQueries, 2)

  const int64_t heads = sizes.batch * sizes.n_heads;
  const int64_t head = blockIdx.x % heads, batch = head / sizes.n_heads, h = head % sizes.n_heads;
  // The first keys are seen by the most queries.
  const int first = static_cast<int>(blockIdx.x / heads) * kBlock;
  const int offset = sizes.k_len - sizes.q_len;
  const int begin = max(0, first - offset) / kQueries;
  // From `full` on every query of a block sees every key of this one.
  const int full = max(begin, (max(0, first + kBlock - 1 - offset) + kQueries - 1) / kQueries);
  const int all = (sizes.q_len + kQueries - 1) / kQueries;
  const T *q_head = in.q.head(batch, h), *dout_head = in.dout.head(batch, h);
  const auto copy_block = [&](int block) {
    const int stage = static_cast<int>(block % 2);
    copy_rows<T, kD, kQueries, kBackwardThreads>(q_tiles + stage * kQueries * kD, q_head, in.q.row_stride,
                                                 block * kQueries, sizes.q_len, sizes.head_dim);
    copy_rows<T, kD, kQueries, kBackwardThreads>(dout_tiles + stage * kQueries * kD, dout_head, in.dout.row_stride,
                                                 block * kQueries, sizes.q_len, sizes.head_dim);
    for (int i = threadIdx.x; i < kQueries; i += kBackwardThreads) {
      const int row = block * kQueries + i;
      const bool exists = row < sizes.q_len;
      // Queries that do not exist weigh nothing.
      store_shared(statistics + stage * 2 * kQueries + i, exists ? lse[head * sizes.q_len + row] * kLog2E : INFINITY);
      store_shared(statistics + (stage * 2 + 1) * kQueries + i, exists ? delta[head * sizes.q_len + row] : 0.0f);
    }
    if (kDropout)
      draw_mask<kQueries, kBackwardThreads>(masks + stage * 2 * kQueries, block * kQueries, first,
                                            static_cast<uint32_t>(head), dropout);
  };
  copy_rows<T, kD, kBlock, kBackwardThreads>(k_tile, in.k.head(batch, h), in.k.row_stride, first, sizes.k_len,
                                             sizes.head_dim);
  copy_rows<T, kD, kBlock, kBackwardThreads>(v_tile, in.v.head(batch, h), in.v.row_stride, first, sizes.k_len,
                                             sizes.head_dim);
  if (begin < all) copy_block(begin);
  copy_async_commit();

  const int lane = threadIdx.x % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int key = first + warp * 16 + lane / 4;
  const float scale2 = sizes.scale * kLog2E;
  float dk_sums[1][kD / 8][4] = {}, dv_sums[1][kD / 8][4] = {};
  const auto step = [&](int block, auto masked) {
    const int stage = static_cast<int>(block % 2);
    copy_async_wait<0>();
    __syncthreads();
    if (block + 1 < all) copy_block(block + 1);
    copy_async_commit();
    T *q_tile = q_tiles + stage * kQueries * kD, *dout_tile = dout_tiles + stage * kQueries * kD;
    const float* row_lse = statistics + stage * 2 * kQueries;
    const unsigned char* mask = reinterpret_cast<const unsigned char*>(masks + stage * 2 * kQueries);
    float weights[1][kQueries / 8][4] = {}, dscores[1][kQueries / 8][4] = {};
    multiply_by_rows<T, kD, kQueries>(weights, q_tile,
                                      [&](uint32_t (&a)[4], int, int i) { load_left<T, kD>(a, k_tile, warp * 16, i); });
    multiply_by_rows<T, kD, kQueries>(dscores, dout_tile,
                                      [&](uint32_t (&a)[4], int, int i) { load_left<T, kD>(a, v_tile, warp * 16, i); });
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = n * 8 + lane % 4 * 2 + e;
        const float query_lse = load_shared(row_lse + column), query_delta = load_shared(row_lse + kQueries + column);
        // Bits 2 warp and 2 warp + 1: this lane's keys.
        const uint32_t keep = kDropout ? load_shared(mask + column * 8 + lane / 4) >> (2 * warp) : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float &weight = weights[0][n][half * 2 + e], &dscore = dscores[0][n][half * 2 + e];
          weight = fast_exp2(weight * scale2 - query_lse);
          if (decltype(masked)::value && key + half * 8 > block * kQueries + column + offset) weight = 0.0f;
          if (kDropout) {
            const bool kept = keep >> half & 1;
            dscore = weight * ((kept ? dscore * dropout.scale : 0.0f) - query_delta);
            weight = kept ? weight : 0.0f;
          } else {
            dscore = weight * (dscore - query_delta);
          }
        }
      }
    multiply_by_columns<T, kD, kQueries>(dv_sums, weights, dout_tile);
    multiply_by_columns<T, kD, kQueries>(dk_sums, dscores, q_tile);
  };
  int block = begin;
  for (; block < min(full, all); ++block) step(block, Constant<true>{});
  for (; block < all; ++block) step(block, Constant<false>{});
  copy_async_wait<0>();
  const float dv_scale = kDropout ? dropout.scale : 1.0f;
  store_rows<T, kD>(dv.head(batch, h), dv.row_stride, key, sizes.k_len, sizes.head_dim, dv_sums[0], dv_scale, dv_scale);
  store_rows<T, kD>(dk.head(batch, h), dk.row_stride, key, sizes.k_len, sizes.head_dim, dk_sums[0], sizes.scale,
                    sizes.scale);
}

// ---- launches

template <class T, int kD, bool kDropout>
cudaError_t attention_backward(Heads<T> dq, Heads<T> dk, Heads<T> dv, float* delta, BackwardInputs<T> in,
                               Heads<const T> out, const float* lse, AttentionSizes sizes, Dropout dropout,
                               cudaStream_t stream) {
  const int64_t heads = sizes.batch * sizes.n_heads;
  const int64_t q_blocks = (sizes.q_len + kBlock - 1) / kBlock * heads;
  const int64_t k_blocks = (sizes.k_len + kBlock - 1) / kBlock * heads;
  if (q_blocks > 0x7fffffff || k_blocks > 0x7fffffff) return cudaErrorInvalidValue;
  if (q_blocks > 0) {
    const cudaError_t error =
        launch(attention_backward_dq_kernel<T, kD, kDropout>, static_cast<unsigned>(q_blocks), kBackwardThreads,
               QueriesTile<kD, kDropout>::kSharedBytes, stream, dq, delta, in, out, lse, sizes, dropout);
    if (error != cudaSuccess) return error;
  }
  if (k_blocks == 0) return cudaSuccess;
  return launch(attention_backward_dkdv_kernel<T, kD, kDropout>, static_cast<unsigned>(k_blocks), kBackwardThreads,
                KeysTile<kD, kDropout>::kSharedBytes, stream, dk, dv, in, lse, static_cast<const float*>(delta), sizes,
                dropout);
}

}  // namespace cuda
}  // namespace fastgpt
