// Causal attention, forward: out = dropout(softmax(q k^T scale + mask)) v, and lse, the log-sum-exp of each row.
//
// Work: a block takes kWarps x 16 kRowTiles queries of one head and walks over blocks of 64 (or 32) keys, the next of
// which is copied while this one is multiplied; a warp owns whole rows, so that the running maximum and sum need four
// lanes and no shared memory, and the weights go from the accumulators of q k^T into the left factor of the product
// with v. Blocks of keys behind the last query are skipped; only those that cross the diagonal are masked. The rows
// with the most keys are started first. fmaxf drops NaN, but exp2 of it does not, so a NaN among the scores reaches its
// row. Bytes: q and out once, k and v once for each block of queries that sees them. 4 head_dim operations for each
// visible (query, key). float32 sums; the weights are rounded to 16 bits. Papers: Dao, "FlashAttention-2", 2023;
// Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
#pragma once

#include "attention_tile.cuh"

namespace fastgpt {
namespace cuda {

template <int kD, bool kDropout>
struct ForwardTile {
  // Two tiles of rows a warp halve the reads of keys from shared memory; at head_dim 128, and with the state of Philox,
  // the registers would spill.
  static constexpr int kRowTiles = kD == 64 && !kDropout ? 2 : 1;
  static constexpr int kWarps = 4;
  static constexpr int kKeys = kD == 64 || !kDropout ? 64 : 32;  // of one block
  static constexpr int kQueries = 16 * kRowTiles * kWarps;
  static constexpr size_t kSharedBytes = (kQueries + 4 * kKeys) * kD * 2;
};

// The running softmax of a lane's two rows of 16.
struct RowState {
  float largest[2] = {-INFINITY, -INFINITY};  // of the raw scores
  float total[2] = {0.0f, 0.0f};              // this lane's part
};

// Turns scores into weights in place, and brings the state and the sums up to date. row: that of c[0]; key: that of
// column 0; last_key: the last that `row` sees.
template <bool kMasked, bool kDropout, int kD, int kKeys>
__device__ inline void softmax_step(RowState& rows, float (&sums)[kD / 8][4], float (&scores)[kKeys / 8][4],
                                    float scale2, int last_key, int key, int row, uint32_t head,
                                    const Dropout& dropout) {
  const int column0 = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (kMasked) {
      // The last column that this row sees.
      const int seen = last_key + half * 8 - key - column0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (n * 8 + e > seen) scores[n][half * 2 + e] = -INFINITY;
    }
    float largest = rows.largest[half];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) largest = fmaxf(largest, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
    largest = row_max(largest);
    const float shift = largest * scale2;
    const float correction = fast_exp2(rows.largest[half] * scale2 - shift);
    rows.largest[half] = largest;
    rows.total[half] *= correction;
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      sums[n][half * 2] *= correction;
      sums[n][half * 2 + 1] *= correction;
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      // Slots of the 64 keys to which this block belongs.
      const uint32_t keep =
          kDropout ? dropout.keep(key / 64 * 8 + column0 + e, row + half * 8, head) >> key % 64 / 8 : 0;
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        float& score = scores[n][half * 2 + e];
        score = fast_exp2(score * scale2 - shift);
        rows.total[half] += score;
        if (kDropout && (keep >> n & 1) == 0) score = 0.0f;
      }
    }
  }
}

template <class T, int kD, bool kDropout>
__global__ void __launch_bounds__(ForwardTile<kD, kDropout>::kWarps* kWarp, 2)
    attention_forward_kernel(Heads<T> out, float* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v,
                             AttentionSizes sizes, Dropout dropout) {
  using Tile = ForwardTile<kD, kDropout>;
  constexpr int kThreads = Tile::kWarps * kWarp, kKeys = Tile::kKeys;
  T* q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* k_tiles = q_tile + Tile::kQueries * kD;
  T* v_tiles = k_tiles + 2 * kKeys * kD;

  const int64_t heads = sizes.batch * sizes.n_heads;
  const int64_t head = blockIdx.x % heads, batch = head / sizes.n_heads, h = head % sizes.n_heads;
  const int blocks = (sizes.q_len + Tile::kQueries - 1) / Tile::kQueries;
  const int first = (blocks - 1 - static_cast<int>(blockIdx.x / heads)) * Tile::kQueries;
  const int offset = sizes.k_len - sizes.q_len;
  // Up to `full` every query of the block sees every key; from `all` on none sees any.
  const int full = (first + offset + 1) / kKeys;
  const int all = (min(first + Tile::kQueries, sizes.q_len) + offset + kKeys - 1) / kKeys;
  const T *k_head = k.head(batch, h), *v_head = v.head(batch, h);
  const auto copy_block = [&](int block) {
    const int stage = static_cast<int>(block % 2) * kKeys * kD;
    copy_rows<T, kD, kKeys, kThreads>(k_tiles + stage, k_head, k.row_stride, block * kKeys, sizes.k_len,
                                      sizes.head_dim);
    copy_rows<T, kD, kKeys, kThreads>(v_tiles + stage, v_head, v.row_stride, block * kKeys, sizes.k_len,
                                      sizes.head_dim);
  };
  copy_rows<T, kD, Tile::kQueries, kThreads>(q_tile, q.head(batch, h), q.row_stride, first, sizes.q_len,
                                             sizes.head_dim);
  copy_block(0);
  copy_async_commit();

  const int lane = threadIdx.x % kWarp, warp_row = static_cast<int>(threadIdx.x) / kWarp * 16 * Tile::kRowTiles;
  const float scale2 = sizes.scale * kLog2E;
  RowState rows[Tile::kRowTiles];
  float sums[Tile::kRowTiles][kD / 8][4] = {};
  const auto step = [&](int block, auto masked) {
    copy_async_wait<0>();
    // The copies of all threads are there, and nobody reads the other stage any more.
    __syncthreads();
    if (block + 1 < all) copy_block(block + 1);
    copy_async_commit();
    T *k_tile = k_tiles + block % 2 * kKeys * kD, *v_tile = v_tiles + block % 2 * kKeys * kD;
    float scores[Tile::kRowTiles][kKeys / 8][4] = {};
    multiply_by_rows<T, kD, kKeys>(
        scores, k_tile, [&](uint32_t (&a)[4], int t, int i) { load_left<T, kD>(a, q_tile, warp_row + t * 16, i); });
#pragma unroll
    for (int t = 0; t < Tile::kRowTiles; ++t) {
      const int row = first + warp_row + t * 16 + lane / 4;
      softmax_step<decltype(masked)::value, kDropout, kD, kKeys>(
          rows[t], sums[t], scores[t], scale2, row + offset, block * kKeys, row, static_cast<uint32_t>(head), dropout);
    }
    multiply_by_columns<T, kD, kKeys>(sums, scores, v_tile);
  };
  int block = 0;
  for (; block < full; ++block) step(block, Constant<false>{});
  for (; block < all; ++block) step(block, Constant<true>{});
  copy_async_wait<0>();

#pragma unroll
  for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
    const int row = first + warp_row + tile * 16 + lane / 4;
    float scales[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(rows[tile].total[half]);
      scales[half] = (kDropout ? dropout.scale : 1.0f) / total;
      const int i = row + half * 8;
      if (lane % 4 == 0 && i < sizes.q_len)
        lse[head * sizes.q_len + i] = rows[tile].largest[half] * sizes.scale + logf(total);
    }
    store_rows<T, kD>(out.head(batch, h), out.row_stride, row, sizes.q_len, sizes.head_dim, sums[tile], scales[0],
                      scales[1]);
  }
}

template <class T, int kD, bool kDropout>
cudaError_t attention_forward(Heads<T> out, float* lse, Heads<const T> q, Heads<const T> k, Heads<const T> v,
                              AttentionSizes sizes, Dropout dropout, cudaStream_t stream) {
  using Tile = ForwardTile<kD, kDropout>;
  const int64_t blocks = (sizes.q_len + Tile::kQueries - 1) / Tile::kQueries * sizes.batch * sizes.n_heads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(attention_forward_kernel<T, kD, kDropout>, static_cast<unsigned>(blocks), Tile::kWarps * kWarp,
                Tile::kSharedBytes, stream, out, lse, q, k, v, sizes, dropout);
}

}  // namespace cuda
}  // namespace fastgpt
