// Causal attention, backward, on Hopper (sm_90a): what attention_backward.cuh computes, by TMA and wgmma.
//
// Two passes of one kernel, so that nothing is added up by atomics and the result does not depend on timing. Each owns
// rows x1, x2 and walks over blocks of 64 rows y1, y2; two warpgroups own 64 rows each:
//
//              x1  x2    y1  y2
//   queries    q   dout  k   v      scores = x1 y1^T   dweights = x2 y2^T   ds = p (m dweights - delta)
//   keys       k   v     q   dout   first += ds y1, which is dq or dk; in the pass over keys second += (p m) y2, dv
//
// p and ds go from accumulators into the left factor of the next product: they never see shared memory. One thread of
// the first warpgroup keeps y1 and y2 coming through a ring of four stages; a block's tiles are the heaviest first, to
// and fro. Of a block a warpgroup starts both products, takes exponentials while dweights is under way, and leaves the
// last product to run beside the next block's scores. At head_dim 64 x1 and x2 stay in registers, because a product of
// 64 columns whose both factors come from shared memory reads them as fast as shared memory can.
// The pass over queries leaves log2(e) lse and delta of each row behind, for as many rows as fill blocks of 64; TMA
// copies them for the pass over keys. There the scores are transposed, and the mask is drawn as in
// attention_backward.cuh: a byte for each (query, key % 8), by all threads of a warpgroup for all.
//
//                                          head_dim 64          head_dim 128
//   shared memory: x1 x2, a stage, in all  32, 16, 96 KiB       64, 32, 192 KiB
//   accumulators: scores, dweights; sums   32, 32; 32 a product 32, 32; 64 a product
//   x1 x2 in registers; left factor        32; 16               0; 16
//   one block, two warpgroups, cycles      queries: products 768, exponentials 512; keys: 1024, 512 (at 4096 FLOP and
//                                          16 exponentials a cycle; head_dim 128: products twice as many)
//   shared memory read by one block        queries: 384, keys: 512 cycles at 128 bytes   (head_dim 128: 1280, 1536)
//   L2 to shared memory a cycle            21 and 16 bytes where the products never wait
//   instructions of a block, a warp        queries: 255, keys: 280      319, 350 (unmasked; two warps a scheduler)
//
// 14 head_dim operations for each visible (query, key), where one pass would do with 10: 300 TFLOP/s of the usual count
// (10) at 1k tokens are 446 of products, the diagonal's 6 % included. The single pass needs dq added up across blocks,
// in an order that semaphores fix; it was left for a day with a GPU.
//
// Tried, by ptxas' report and machine code (tests/test_cuda_sass.py):
//   without after_weights ptxas waits for dweights before it takes exponentials, in the pass over queries
//   dv's product beside the gradient of the scores: at head_dim 128 ptxas serializes every product (C7512)
//   head_dim 128 with dropout: 112 bytes spilled; none with the mask drawn before the products, its bits gathered in a
//   loop, and a thread's place found anew each time
//   instructions, head_dim 64: 289 and 356 where each descriptor is made anew from a stage that ptxas does not know to
//   be uniform, and where lse and delta lie side by side
//
// No GPU has run this yet: which descriptors wgmma takes, how well two warpgroups fill each other's gaps, and every
// figure above but registers are unproven. Papers: those of attention_hopper.cuh and attention_backward.cuh.
#pragma once

#include "attention_backward_hopper_tile.cuh"

namespace fastgpt {
namespace cuda {

// A warpgroup of 64 owned rows.
template <class T, int kD, bool kKeys, bool kDropout>
struct GradientConsumer {
  using Tile = GradientTile<kD, kKeys, kDropout>;
  static constexpr int kN = Tile::kRows / 8;
  static constexpr int kSteps = Tile::kInRegisters ? kD / 16 : 1;

  const GradientShared<Tile> shared;
  const GradientCall<T>& call;
  const Dropout& dropout;
  PipelineState<Tile::kStages> blocks;  // of the block that is read next
  int drawn;                            // masks so far

  // Found anew each time rather than kept in registers.
  static __device__ int thread() {
    uint32_t index = threadIdx.x;
    hold(index);
    return static_cast<int>(index);
  }
  static __device__ int lane() { return thread() % kWarp; }
  static __device__ int warp() { return thread() % kWarpgroup / kWarp; }
  static __device__ int group() { return thread() / kWarpgroup - 1; }

  static __device__ int first_row(const RowTile& tile) { return tile.block * Tile::kOwned + group() * 64; }

  // This lane's fragments of the owned rows.
  __device__ void load_owned(uint32_t (&owned)[2][kSteps][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
        load_left<T, kPanel>(owned[i][s], static_cast<T*>(shared_pointer(shared.owned(i))), group() * 64 + warp() * 16,
                             s);
  }

  // c = x y^T of the block in this stage.
  __device__ void start_rows(float (&c)[kN][4], const uint32_t (&owned)[2][kSteps][4], int which, int stage) const {
    const SharedAddress y = shared.read(stage, which);
    products_begin();
    if constexpr (Tile::kInRegisters) {
      multiply_rows<T, false>(c, owned[which][0], rows_descriptor(y, Tile::kRows, 0));
#pragma unroll
      for (int s = 1; s < kD / 16; ++s) multiply_rows<T, true>(c, owned[which][s], rows_descriptor(y, Tile::kRows, s));
    } else {
      const SharedAddress x = uniform(shared.owned(which) + group() * 64 * kPanelRowBytes);
      multiply_rows<T, false>(c, rows_descriptor(x, Tile::kOwned, 0), rows_descriptor(y, Tile::kRows, 0));
#pragma unroll
      for (int s = 1; s < kD / 16; ++s)
        multiply_rows<T, true>(c, rows_descriptor(x, Tile::kOwned, s), rows_descriptor(y, Tile::kRows, s));
    }
    products_commit();
  }

  // sums += left y.
  __device__ void start_columns(float (&sums)[kD / 8][4], const uint32_t (&left)[kN / 2][4], int which,
                                int stage) const {
    products_begin();
#pragma unroll
    for (int s = 0; s < kN / 2; ++s)
      multiply_columns<T>(sums, left[s], columns_descriptor(shared.read(stage, which), Tile::kRows, s));
    products_commit();
  }

  // Which weights of block j dropout keeps: kept[half] bit 8 e + n, as Dropout::keep_rows.
  __device__ void draw(uint32_t (&kept)[2], const RowTile& tile, int j) {
    const int g = lane() / 4, column0 = lane() % 4 * 2;
    if constexpr (kKeys) {
      uint32_t* const words = static_cast<uint32_t*>(shared_pointer(shared.mask(group(), drawn++)));
      draw_mask<Tile::kRows, kWarpgroup>(words, j * Tile::kRows, first_row(tile), tile.head, dropout);
      // Behind it all have read the mask before this one too, whose place the next one takes.
      named_wait(1 + group(), kWarpgroup);
      const unsigned char* const mask = reinterpret_cast<const unsigned char*>(words);
      kept[0] = kept[1] = 0;
#pragma unroll 1
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t byte = static_cast<uint32_t>(load_shared(mask + (n * 8 + column0 + e) * 8 + g)) >> 2 * warp();
          kept[0] |= (byte & 1) << (e * 8 + n);
          kept[1] |= (byte >> 1 & 1) << (e * 8 + n);
        }
    } else {
      dropout.keep_rows<1>(kept, static_cast<uint32_t>(j * 8 + column0),
                           static_cast<uint32_t>(first_row(tile) + warp() * 16 + g), tile.head);
    }
  }

  // lse2 (which: 0) and delta (1) of accumulator (n, i): of its row where queries are owned, of its column where keys
  // are.
  struct Statistics {
    struct alignas(8) Pair {
      float values[2];
    };
    float rows[kStatistics][2];
    SharedAddress columns;

    __device__ Pair of(int n, int which) const {
      if (!kKeys) return {};
      return load_shared(static_cast<const Pair*>(shared_pointer(columns + (which * Tile::kRows + n * 8) * 4)));
    }
    __device__ float pick(const Pair& pair, int i, int which) const {
      return kKeys ? pair.values[i % 2] : rows[which][i / 2];
    }
  };

  // delta of this lane's rows; both statistics of them for the pass over keys.
  __device__ void own_statistics(Statistics& statistics, const RowTile& tile) const {
    const AttentionSizes& sizes = call.sizes;
    const uint32_t n_heads = static_cast<uint32_t>(sizes.n_heads);
    const int64_t b = tile.head / n_heads, h = tile.head % n_heads;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row(tile) + warp() * 16 + lane() / 4 + half * 8;
      // All four lanes of a row come to its shuffles, whether the row exists or not; one that does not weighs nothing.
      const int64_t safe = min(row, sizes.q_len - 1);
      const float delta = row_product<kD>(call.dout.head(b, h) + safe * call.dout.row_stride,
                                          call.out.head(b, h) + safe * call.out.row_stride, sizes.head_dim);
      const bool exists = row < sizes.q_len;
      statistics.rows[0][half] = exists ? call.lse[int64_t{tile.head} * sizes.q_len + safe] * kLog2E : INFINITY;
      statistics.rows[1][half] = exists ? delta : 0.0f;
      const int64_t rows = statistics_rows(sizes.q_len);
      if (lane() % 4 == 0 && row < rows)
        for (int i = 0; i < kStatistics; ++i) {
          const int64_t block = tile.head * rows + row / kGradientRows * kGradientRows;
          call.statistics[block * kStatistics + i * kGradientRows + row % kGradientRows] = statistics.rows[i][half];
        }
    }
  }

  // Scores into weights. edge: the last column that the lane's first row meets, or the first, from its first column.
  template <bool kMasked>
  __device__ void weigh(float (&scores)[kN][4], const Statistics& statistics, int edge) const {
    const float scale2 = call.sizes.scale * kLog2E;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const auto lse2 = statistics.of(n, 0);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = fast_exp2(scores[n][i] * scale2 - statistics.pick(lse2, i, 0));
        const int at = n * 8 + i % 2 - i / 2 * 8;
        if (kMasked && (kKeys ? at < edge : at > edge)) scores[n][i] = 0.0f;
      }
    }
  }

  // dweights are waited for when all weights are there: their sign bits, which are 0, are what after_sum looks at.
  static __device__ void after_weights(const float (&weights)[kN][4]) {
    uint32_t bits = 0;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) bits |= __float_as_uint(weights[n][i]);
    after_sum(__uint_as_float(bits));
  }

  static __device__ bool keeps(const uint32_t (&kept)[2], int n, int i) {
    return !kDropout || (kept[i / 2] >> (i % 2 * 8 + n) & 1);
  }

  // The gradients of one tile.
  __device__ void run(RowTile tile, uint32_t round) {
    const AttentionSizes& sizes = call.sizes;
    const BlockRange all = blocks_that_meet<kKeys>(tile.block * Tile::kOwned, Tile::kOwned, sizes);
    const BlockRange mine = blocks_that_meet<kKeys>(first_row(tile), 64, sizes);
    const int offset = sizes.k_len - sizes.q_len;
    const int edge0 = first_row(tile) + warp() * 16 + lane() / 4 + (kKeys ? -offset : offset) - lane() % 4 * 2;

    uint32_t owned[2][kSteps][4];
    Statistics statistics;
    if (!kKeys) own_statistics(statistics, tile);
    barrier_wait(shared.owned_full(), round & 1);
    if (Tile::kInRegisters) {
      load_owned(owned);
      release(shared.owned_empty());
    }
    const auto pass = [&](int from, int to) {
      for (int j = from; j < to; ++j) {
        barrier_wait(shared.full(blocks.stage), blocks.phase);
        release(shared.empty(blocks.stage));
        blocks.advance();
      }
    };
    if (kKeys) pass(all.begin, mine.begin);
    if (mine.begin < mine.end) {
      float scores[kN][4], dweights[kN][4], first[kD / 8][4] = {}, second[kKeys ? kD / 8 : 1][4] = {};
      uint32_t left[kN / 2][4] = {}, kept[2] = {};

      const auto step = [&](int j, auto masked) {
        const int stage = static_cast<int>(uniform(blocks.stage));
        if (kDropout && !Tile::kOverlaps) draw(kept, tile, j);
        barrier_wait(shared.full(stage), blocks.phase);
        start_rows(scores, owned, 0, stage);
        start_rows(dweights, owned, 1, stage);
        if (kDropout && Tile::kOverlaps) draw(kept, tile, j);
        // The scores are there, and with them what the last block left under way.
        products_wait<1>();
        hold(scores);
        hold(first);
        hold(left);
        if (j > mine.begin) release(shared.empty((stage + Tile::kStages - 1) % Tile::kStages));
        if (kKeys) statistics.columns = shared.statistics(stage) + lane() % 4 * 2 * 4;
        weigh<decltype(masked)::value>(scores, statistics, edge0 - j * Tile::kRows);
        if constexpr (kKeys) {
          if (kDropout) {
            float kept_scores[kN][4];
#pragma unroll
            for (int n = 0; n < kN; ++n)
#pragma unroll
              for (int i = 0; i < 4; ++i) kept_scores[n][i] = keeps(kept, n, i) ? scores[n][i] : 0.0f;
            round_left<T>(left, kept_scores);
          } else {
            round_left<T>(left, scores);
          }
          start_columns(second, left, 1, stage);
          products_wait<Tile::kOverlaps ? 1 : 0>();
          if (!Tile::kOverlaps) {
            hold(second);
            hold(left);
          }
        } else {
          after_weights(scores);
          products_wait<0>();
        }
        hold(dweights);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          const auto delta = statistics.of(n, 1);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float dweight = dweights[n][i];
            if (kDropout) dweight = keeps(kept, n, i) ? dweight * dropout.scale : 0.0f;
            scores[n][i] *= dweight - statistics.pick(delta, i, 1);
          }
        }
        if constexpr (kKeys && Tile::kOverlaps) {
          products_wait<0>();
          hold(second);
          hold(left);
        }
        round_left<T>(left, scores);
        start_columns(first, left, 0, stage);
        blocks.advance();
      };
      int j = mine.begin;
      for (; j < mine.split; ++j) step(j, Constant<kKeys>{});
      for (; j < mine.end; ++j) step(j, Constant<!kKeys>{});
      products_wait<0>();
      hold(first);
      hold(left);
      release(shared.empty((blocks.stage + Tile::kStages - 1) % Tile::kStages));

      hold(round);
      tile.find<kKeys>(sizes, kKeys ? sizes.k_len : sizes.q_len, Tile::kOwned, round);
      const int row = first_row(tile) + warp() * 16 + lane() / 4;
      const uint32_t n_heads = static_cast<uint32_t>(sizes.n_heads);
      const int64_t b = tile.head / n_heads, h = tile.head % n_heads;
      const int length = kKeys ? sizes.k_len : sizes.q_len;
      store_rows<T, kD>(call.first.head(b, h), call.first.row_stride, row, length, sizes.head_dim, first, sizes.scale,
                        sizes.scale);
      if constexpr (kKeys) {
        const float scale = kDropout ? dropout.scale : 1.0f;
        store_rows<T, kD>(call.second.head(b, h), call.second.row_stride, row, length, sizes.head_dim, second, scale,
                          scale);
      }
    }
    if (!kKeys) pass(mine.end, all.end);
    if (!Tile::kInRegisters) release(shared.owned_empty());
  }
};

template <class T, int kD, bool kKeys, bool kDropout>
__global__ void __launch_bounds__(GradientTile<kD, kKeys, kDropout>::kThreads, 1)
    attention_backward_hopper_kernel(const __grid_constant__ GradientMaps maps, GradientCall<T> call, Dropout dropout) {
#if FASTGPT_SM90A
  using Tile = GradientTile<kD, kKeys, kDropout>;
  const GradientShared<Tile> shared(dynamic_shared());
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      prefetch_map(&maps.owned[i]);
      prefetch_map(&maps.read[i]);
    }
    shared.init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) produce_gradients<kKeys>(shared, maps, call.sizes, call.statistics);
  } else {
    take_registers<Tile::kConsumerRegisters>();
    GradientConsumer<T, kD, kKeys, kDropout> consumer{shared, call, dropout, {}, 0};
    const int length = kKeys ? call.sizes.k_len : call.sizes.q_len;
    RowTile tile;
    for (uint32_t round = 0; tile.template find<kKeys>(call.sizes, length, Tile::kOwned, round); ++round)
      consumer.run(tile, round);
  }
#endif
}

// processors: of this GPU.
template <class T, int kD, bool kKeys, bool kDropout>
cudaError_t attention_backward_hopper(const GradientMaps& maps, const GradientCall<T>& call, Dropout dropout,
                                      int processors, cudaStream_t stream) {
  using Tile = GradientTile<kD, kKeys, kDropout>;
  const AttentionSizes& sizes = call.sizes;
  const int64_t length = kKeys ? sizes.k_len : sizes.q_len;
  const int64_t tiles = (length + Tile::kOwned - 1) / Tile::kOwned * sizes.batch * sizes.n_heads;
  if (tiles > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(attention_backward_hopper_kernel<T, kD, kKeys, kDropout>, blocks_for(tiles, 1, processors),
                Tile::kThreads, Tile::kSharedBytes, stream, maps, call, dropout);
}

}  // namespace cuda
}  // namespace fastgpt
