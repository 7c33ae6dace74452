// Causal attention, forward, on Hopper (sm_90a): what attention.cuh computes, by TMA and wgmma.
//
// Work: one block a multiprocessor walks over tiles of 192 (head_dim 128, or with dropout: 128) queries of one head,
// the heaviest first and to and fro. One thread of the first warpgroup keeps blocks of 128 keys and values coming
// through a ring of stages; three (two) warpgroups own 64 queries each. Of block j a warpgroup starts q k^T, and behind
// it the product of block j - 1 with v, whose left factor stays in registers; the softmax of block j runs while the
// latter is under way. The warpgroups start their products in turn, so that one multiplies while another takes
// exponentials. Only blocks that cross the diagonal of a warpgroup are masked, and what lies behind it is passed on
// unread. float32 sums; the weights are rounded to 16 bits.
//
//                                       head_dim 64          head_dim 128
//   shared memory of q, of a stage      24 KiB, 32 KiB       32 KiB, 64 KiB
//   stages, in all                      3, 120 KiB           2, 160 KiB
//   registers: producer, consumers      32, 160              24, 240
//   accumulators q k^T, out; left       64, 32; 32           64, 64; 32
//   a block of keys, one warpgroup      2.1 MFLOP, 512 cycles of the tensor cores at 4096 FLOP a cycle; 8192
//                                       exponentials, 512 cycles at 16 a cycle   (head_dim 128: 4.2, 1024; 512)
// So at head_dim 64 half of the peak is lost where exponentials and products do not overlap. Dropout draws the bits of
// a block while its scores are under way, two draws at a time: with all eight at once, with the rounds' keys made from
// the seed, or with three warpgroups at head_dim 64, registers spill (704, 372 and 132 bytes). An unmasked block is 446
// instructions of a warp (head_dim 128: 506); 488 (560) before descriptors were made in uniform registers.
//
// No GPU has run this yet. Papers: Shah et al., "FlashAttention-3", 2024, and those of attention.cuh.
#pragma once

#include "attention_hopper_tile.cuh"

namespace fastgpt {
namespace cuda {

template <int kD, bool kDropout>
struct HopperTile {
  static constexpr int kHeadDim = kD;
  // Beside three times 160 registers there is no room for Philox.
  static constexpr int kConsumers = kD == 64 && !kDropout ? 3 : 2;  // warpgroups
  static constexpr int kStages = kD == 64 ? 3 : 2;
  static constexpr int kKeys = 128;  // of one block
  static constexpr int kQueries = 64 * kConsumers;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kProducerRegisters = kConsumers == 3 ? 32 : 24;
  static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 240;
  static constexpr int kQueryBytes = kQueries * kD * 2, kBlockBytes = kKeys * kD * 2;
  // Of keys: full, empty; of values: full, empty; of queries: full, empty.
  static constexpr int kBarriers = 4 * kStages + 2;
  // The first kSwizzleBytes let the tiles begin at a multiple of as many.
  static constexpr size_t kSharedBytes =
      kSwizzleBytes + kQueryBytes + 2 * kStages * kBlockBytes + kBarriers * kBarrierBytes;
  static_assert(kSharedBytes <= 227 * 1024, "more than a block can have");
  static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 65536, "too many registers");
};

struct ForwardMaps {
  TensorMap q, k, v;
};

// The shared memory of a block, and its barriers.
template <class Tile>
struct HopperShared {
  SharedAddress base;

  __device__ explicit HopperShared(const void* memory)
      : base((shared_address(memory) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes) {}

  __device__ SharedAddress q() const { return base; }
  __device__ SharedAddress k(int stage) const { return base + Tile::kQueryBytes + stage * Tile::kBlockBytes; }
  __device__ SharedAddress v(int stage) const { return k(Tile::kStages + stage); }
  __device__ SharedAddress barrier(int i) const { return k(2 * Tile::kStages) + i * kBarrierBytes; }
  __device__ SharedAddress k_full(int stage) const { return barrier(stage); }
  __device__ SharedAddress k_empty(int stage) const { return barrier(Tile::kStages + stage); }
  __device__ SharedAddress v_full(int stage) const { return barrier(2 * Tile::kStages + stage); }
  __device__ SharedAddress v_empty(int stage) const { return barrier(3 * Tile::kStages + stage); }
  __device__ SharedAddress q_full() const { return barrier(4 * Tile::kStages); }
  __device__ SharedAddress q_empty() const { return barrier(4 * Tile::kStages + 1); }

  __device__ void init() const {
    // Every warp of the consumers says when it has read a stage.
    constexpr int kReaders = Tile::kConsumers * kWarpgroup / kWarp;
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(k_full(stage), 1);
      barrier_init(v_full(stage), 1);
      barrier_init(k_empty(stage), kReaders);
      barrier_init(v_empty(stage), kReaders);
    }
    barrier_init(q_full(), 1);
    barrier_init(q_empty(), kReaders);
    barrier_init_fence();
  }
};

// One thread: asks for the tiles in the order in which they are read.
template <class Tile>
__device__ inline void produce(const HopperShared<Tile>& shared, const ForwardMaps& maps, const AttentionSizes& sizes) {
  PipelineState<Tile::kStages> state;
  const auto copy = [&](SharedAddress to, const TensorMap* map, SharedAddress full, auto rows, int first, int h,
                        int b) {
    constexpr int kRows = decltype(rows)::value;
    barrier_arrive_and_expect(full, kRows * Tile::kHeadDim * 2);
    copy_tile<Tile::kHeadDim, kRows>(to, map, full, first, h, b);
  };
  RowTile tile;
  for (uint32_t round = 0; tile.find<false>(sizes, sizes.q_len, Tile::kQueries, round); ++round) {
    const int first = tile.block * Tile::kQueries;
    const uint32_t n_heads = static_cast<uint32_t>(sizes.n_heads);
    const int b = static_cast<int>(tile.head / n_heads), h = static_cast<int>(tile.head % n_heads);
    const int all = key_blocks(first, Tile::kQueries, Tile::kKeys, sizes.q_len, sizes.k_len).all;
    for (int j = 0; j < all; ++j) {
      barrier_wait(shared.k_empty(state.stage), state.phase ^ 1);
      copy(shared.k(state.stage), &maps.k, shared.k_full(state.stage), Integer<Tile::kKeys>{}, j * Tile::kKeys, h, b);
      if (j == 0) {
        // The keys of a new tile may come before the queries of the last one are done with.
        barrier_wait(shared.q_empty(), (round & 1) ^ 1);
        copy(shared.q(), &maps.q, shared.q_full(), Integer<Tile::kQueries>{}, first, h, b);
      }
      barrier_wait(shared.v_empty(state.stage), state.phase ^ 1);
      copy(shared.v(state.stage), &maps.v, shared.v_full(state.stage), Integer<Tile::kKeys>{}, j * Tile::kKeys, h, b);
      state.advance();
    }
  }
}

// The running softmax of a lane's rows g and g + 8 of its warp's 16.
struct HopperRows {
  float largest[2] = {-INFINITY, -INFINITY};  // of the raw scores
  float total[2] = {0.0f, 0.0f};              // this lane's part
  float correction[2];                        // of earlier sums, by the last step
};

// Turns the scores of 128 keys into weights. seen: the last column that row g sees, from this lane's first column.
// kept: as Dropout::keep_rows says.
template <bool kMasked, bool kDropout, int kN>
__device__ inline void weigh(HopperRows& rows, float (&scores)[kN][4], float scale2, int seen,
                             const uint32_t (&kept)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (kMasked) {
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (n * 8 + e > seen + half * 8) scores[n][half * 2 + e] = -INFINITY;
    }
    float largest = rows.largest[half];
#pragma unroll
    for (int n = 0; n < kN; ++n) largest = fmaxf(largest, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
    largest = row_max(largest);
    const float shift = largest * scale2;
    rows.correction[half] = fast_exp2(rows.largest[half] * scale2 - shift);
    rows.largest[half] = largest;
    float total = rows.total[half] * rows.correction[half];
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[n][half * 2 + e];
        score = fast_exp2(score * scale2 - shift);
        total += score;
        if (kDropout && (kept[half] >> (n / 8 * 16 + e * 8 + n % 8) & 1) == 0) score = 0.0f;
      }
    rows.total[half] = total;
  }
}

// A warpgroup of 64 queries. group: 0 .. kConsumers - 1.
template <class T, int kD, bool kDropout>
struct HopperConsumer {
  using Tile = HopperTile<kD, kDropout>;
  static constexpr int kN = Tile::kKeys / 8;
  static constexpr int kTurnThreads = 2 * kWarpgroup;  // who waits for its turn, and who gives it

  const HopperShared<Tile> shared;
  const AttentionSizes& sizes;
  const Dropout& dropout;
  const int group;
  PipelineState<Tile::kStages> values;  // of the values that are read next

  __device__ void wait_for_turn() const { named_wait(1 + group, kTurnThreads); }
  __device__ void give_turn() const { named_arrive(1 + (group + 1) % Tile::kConsumers, kTurnThreads); }

  __device__ void start_scores(float (&scores)[kN][4], int stage) const {
    const uint32_t q = uniform(shared.q() + group * 64 * kPanelRowBytes);
    const uint32_t k = uniform(shared.k(stage));
    products_begin();
    multiply_rows<T, false>(scores, rows_descriptor(q, Tile::kQueries, 0), rows_descriptor(k, Tile::kKeys, 0));
#pragma unroll
    for (int s = 1; s < kD / 16; ++s)
      multiply_rows<T, true>(scores, rows_descriptor(q, Tile::kQueries, s), rows_descriptor(k, Tile::kKeys, s));
    products_commit();
  }

  __device__ void start_sums(float (&sums)[kD / 8][4], const uint32_t (&left)[kN / 2][4]) const {
    const uint32_t v = uniform(shared.v(values.stage));
    products_begin();
#pragma unroll
    for (int s = 0; s < kN / 2; ++s) multiply_columns<T>(sums, left[s], columns_descriptor(v, Tile::kKeys, s));
    products_commit();
  }

  // Keys are one block ahead of the values, but for the first of a tile.
  __device__ PipelineState<Tile::kStages> ahead() const {
    PipelineState<Tile::kStages> keys = values;
    keys.advance();
    return keys;
  }

  __device__ void wait_for_keys(const PipelineState<Tile::kStages>& keys) const {
    barrier_wait(shared.k_full(keys.stage), keys.phase);
  }
  __device__ void wait_for_values() const { barrier_wait(shared.v_full(values.stage), values.phase); }

  __device__ void release_values() {
    release(shared.v_empty(values.stage));
    values.advance();
  }

  // Found anew each time rather than kept in registers beside the scores.
  static __device__ int thread() {
    uint32_t index = threadIdx.x;
    hold(index);
    return static_cast<int>(index) - kWarpgroup;
  }

  __device__ int first_row(const RowTile& tile) const {
    const int t = thread();
    return tile.block * Tile::kQueries + t / kWarp * 16 + t % kWarp / 4;
  }

  __device__ KeyBlocks blocks_of(const RowTile& tile) const {
    return key_blocks(tile.block * Tile::kQueries + thread() / kWarpgroup * 64, 64, Tile::kKeys, sizes.q_len,
                      sizes.k_len);
  }

  // What dropout keeps of the weights of block j. Drawn while their scores are under way.
  __device__ void draw(uint32_t (&kept)[2], const RowTile& tile, int j) const {
    if (kDropout)
      dropout.keep_rows<Tile::kKeys / 64>(kept, static_cast<uint32_t>(j * Tile::kKeys / 8 + thread() % 4 * 2),
                                          static_cast<uint32_t>(first_row(tile)), tile.head);
  }

  // out and lse of one tile.
  __device__ void run(Heads<T> out, float* lse, RowTile tile, uint32_t round) {
    const float scale2 = sizes.scale * kLog2E;
    const KeyBlocks mine = blocks_of(tile);
    const int seen0 = first_row(tile) + sizes.k_len - sizes.q_len - thread() % 4 * 2;
    barrier_wait(shared.q_full(), round & 1);
    if (mine.all > 0) {
      HopperRows rows;
      float scores[kN][4], sums[kD / 8][4] = {};
      uint32_t left[kN / 2][4], kept[2];

      wait_for_keys(values);
      wait_for_turn();
      start_scores(scores, values.stage);
      give_turn();
      draw(kept, tile, 0);
      products_wait<0>();
      hold(scores);
      release(shared.k_empty(values.stage));
      // Rows see the first key, so that their largest score is known from here on.
      weigh<true, kDropout>(rows, scores, scale2, seen0, kept);
      round_left<T>(left, scores);

      const auto step = [&](int j, auto masked) {
        const PipelineState<Tile::kStages> keys = ahead();
        wait_for_keys(keys);
        wait_for_turn();
        start_scores(scores, keys.stage);
        wait_for_values();
        start_sums(sums, left);
        give_turn();
        draw(kept, tile, j);
        products_wait<1>();
        hold(scores);
        release(shared.k_empty(keys.stage));
        weigh<decltype(masked)::value, kDropout>(rows, scores, scale2, seen0 - j * Tile::kKeys, kept);
        // All of this while the sums are under way; ptxas would wait for them first.
        after_sum(rows.total[0]);
        after_sum(rows.total[1]);
        products_wait<0>();
        hold(sums);
        hold(left);
        release_values();
#pragma unroll
        for (int n = 0; n < kD / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[n][i] *= rows.correction[i / 2];
        round_left<T>(left, scores);
      };
      int j = 1;
      for (; j < mine.full; ++j) step(j, Constant<false>{});
      for (; j < mine.all; ++j) step(j, Constant<true>{});
      release(shared.q_empty());

      wait_for_values();
      start_sums(sums, left);
      products_wait<0>();
      hold(sums);
      release_values();
      hold(round);
      tile.find<false>(sizes, sizes.q_len, Tile::kQueries, round);
      store(out, lse, tile.head, first_row(tile), rows, sums);
    } else {
      release(shared.q_empty());
    }
    // Blocks that only later queries of the tile see: the turn goes round all the same.
    hold(round);
    tile.find<false>(sizes, sizes.q_len, Tile::kQueries, round);
    const int all = key_blocks(tile.block * Tile::kQueries, Tile::kQueries, Tile::kKeys, sizes.q_len, sizes.k_len).all;
    for (int j = blocks_of(tile).all; j < all; ++j) {
      wait_for_turn();
      give_turn();
      wait_for_keys(values);
      release(shared.k_empty(values.stage));
      wait_for_values();
      release_values();
    }
  }

  __device__ void store(Heads<T> out, float* lse, uint32_t head, int row, const HopperRows& rows,
                        const float (&sums)[kD / 8][4]) const {
    const uint32_t n_heads = static_cast<uint32_t>(sizes.n_heads);
    float scales[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = row_sum(rows.total[half]);
      scales[half] = (kDropout ? dropout.scale : 1.0f) / total;
      const int i = row + half * 8;
      if (threadIdx.x % 4 == 0 && i < sizes.q_len)
        lse[static_cast<int64_t>(head) * sizes.q_len + i] = rows.largest[half] * sizes.scale + logf(total);
    }
    store_rows<T, kD>(out.head(head / n_heads, head % n_heads), out.row_stride, row, sizes.q_len, sizes.head_dim, sums,
                      scales[0], scales[1]);
  }
};

template <class T, int kD, bool kDropout>
__global__ void __launch_bounds__(HopperTile<kD, kDropout>::kThreads, 1)
    attention_forward_hopper_kernel(const __grid_constant__ ForwardMaps maps, Heads<T> out, float* lse,
                                    AttentionSizes sizes, Dropout dropout) {
#if FASTGPT_SM90A
  using Tile = HopperTile<kD, kDropout>;
  const HopperShared<Tile> shared(dynamic_shared());
  if (threadIdx.x == 0) {
    prefetch_map(&maps.q);
    prefetch_map(&maps.k);
    prefetch_map(&maps.v);
    shared.init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroup) {
    give_registers<Tile::kProducerRegisters>();
    if (threadIdx.x == 0) produce(shared, maps, sizes);
  } else {
    take_registers<Tile::kConsumerRegisters>();
    const int group = static_cast<int>(threadIdx.x) / kWarpgroup - 1;
    HopperConsumer<T, kD, kDropout> consumer{shared, sizes, dropout, group, {}};
    // The last gives the first its first turn, and the first takes the last one that is given.
    if (group == Tile::kConsumers - 1) consumer.give_turn();
    RowTile tile;
    for (uint32_t round = 0; tile.find<false>(sizes, sizes.q_len, Tile::kQueries, round); ++round)
      consumer.run(out, lse, tile, round);
    if (group == 0) consumer.wait_for_turn();
  }
#endif
}

// processors: of this GPU.
template <class T, int kD, bool kDropout>
cudaError_t attention_forward_hopper(const ForwardMaps& maps, Heads<T> out, float* lse, AttentionSizes sizes,
                                     Dropout dropout, int processors, cudaStream_t stream) {
  using Tile = HopperTile<kD, kDropout>;
  const int64_t tiles = (sizes.q_len + Tile::kQueries - 1) / Tile::kQueries * sizes.batch * sizes.n_heads;
  if (tiles == 0) return cudaSuccess;
  if (tiles > 0x7fffffff) return cudaErrorInvalidValue;
  return launch(attention_forward_hopper_kernel<T, kD, kDropout>, blocks_for(tiles, 1, processors), Tile::kThreads,
                Tile::kSharedBytes, stream, maps, out, lse, sizes, dropout);
}

}  // namespace cuda
}  // namespace fastgpt
