// The tiles of attention_backward_hopper.cuh: sizes, shared memory, barriers, and the thread that asks for copies.
#pragma once

#include "attention_hopper_tile.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kStatistics = 2;  // of a query: log2(e) lse, delta

template <int kD, bool kKeys, bool kDropout>
struct GradientTile {
  static constexpr int kHeadDim = kD;
  static constexpr int kConsumers = 2;            // warpgroups
  static constexpr int kOwned = 64 * kConsumers;  // rows
  static constexpr int kRows = kGradientRows;     // of a block that is read
  static constexpr int kStages = 4;
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr bool kInRegisters = kD == 64;
  // The product for dv beside the scores' gradient. At head_dim 128 ptxas finds registers for it by waiting everywhere.
  static constexpr bool kOverlaps = kD == 64;
  static constexpr int kOwnedBytes = kOwned * kD * 2, kBlockBytes = kRows * kD * 2;
  static constexpr int kStatisticsBytes = kKeys ? kRows * kStatistics * 4 : 0;
  static constexpr int kStageBytes = 2 * kBlockBytes + kStatisticsBytes;
  // A byte for each row that is read and key % 8, twice for each warpgroup.
  static constexpr int kMaskBytes = kKeys && kDropout ? kRows * 8 : 0;
  static constexpr int kBarriers = 2 * kStages + 2;  // of stages: full, empty; of what is owned: full, empty
  static constexpr size_t kSharedBytes =
      kSwizzleBytes + 2 * kOwnedBytes + kStages * kStageBytes + 2 * kConsumers * kMaskBytes + kBarriers * kBarrierBytes;
  static_assert(kSharedBytes <= 227 * 1024, "more than a block can have");
};

struct GradientMaps {
  TensorMap owned[2], read[2];  // boxes of 64 rows
};

template <class T>
struct GradientCall {
  Heads<T> first, second;    // dq; or dk, dv
  Heads<const T> dout, out;  // of the pass over queries
  const float* lse;
  float* statistics;  // (heads, blocks of 64 queries, kStatistics, 64)
  AttentionSizes sizes;
};

// The shared memory of a block, and its barriers.
template <class Tile>
struct GradientShared {
  SharedAddress base;

  __device__ explicit GradientShared(const void* memory)
      : base((shared_address(memory) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes) {}

  __device__ SharedAddress owned(int which) const { return base + which * Tile::kOwnedBytes; }
  __device__ SharedAddress read(int stage, int which) const {
    return owned(2) + (2 * stage + which) * Tile::kBlockBytes;
  }
  __device__ SharedAddress statistics(int stage) const {
    return read(Tile::kStages, 0) + stage * Tile::kStatisticsBytes;
  }
  __device__ SharedAddress mask(int group, int drawn) const {
    return statistics(Tile::kStages) + (2 * group + drawn % 2) * Tile::kMaskBytes;
  }
  __device__ SharedAddress barrier(int i) const { return mask(Tile::kConsumers, 0) + i * kBarrierBytes; }
  __device__ SharedAddress full(int stage) const { return barrier(stage); }
  __device__ SharedAddress empty(int stage) const { return barrier(Tile::kStages + stage); }
  __device__ SharedAddress owned_full() const { return barrier(2 * Tile::kStages); }
  __device__ SharedAddress owned_empty() const { return barrier(2 * Tile::kStages + 1); }

  __device__ void init() const {
    constexpr int kReaders = Tile::kConsumers * kWarpgroup / kWarp;
    for (int stage = 0; stage < Tile::kStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), kReaders);
    }
    barrier_init(owned_full(), 1);
    barrier_init(owned_empty(), kReaders);
    barrier_init_fence();
  }
};

// The blocks that meet the `rows` rows from `first` on: begin .. end - 1, masked on one side of `split`.
template <bool kKeys>
__device__ inline BlockRange blocks_that_meet(int first, int rows, const AttentionSizes& sizes) {
  if (kKeys) return query_blocks(first, rows, kGradientRows, sizes.q_len, sizes.k_len);
  const KeyBlocks blocks = key_blocks(first, rows, kGradientRows, sizes.q_len, sizes.k_len);
  return {0, blocks.full, blocks.all};
}

// One thread: asks for the tiles in the order in which they are read.
template <bool kKeys, class Tile>
__device__ inline void produce_gradients(const GradientShared<Tile>& shared, const GradientMaps& maps,
                                         const AttentionSizes& sizes, const float* statistics) {
  PipelineState<Tile::kStages> state;
  const int length = kKeys ? sizes.k_len : sizes.q_len;
  const uint32_t n_heads = static_cast<uint32_t>(sizes.n_heads);
  RowTile tile;
  for (uint32_t round = 0; tile.template find<kKeys>(sizes, length, Tile::kOwned, round); ++round) {
    const int first = tile.block * Tile::kOwned;
    const int b = static_cast<int>(tile.head / n_heads), h = static_cast<int>(tile.head % n_heads);
    const BlockRange blocks = blocks_that_meet<kKeys>(first, Tile::kOwned, sizes);
    for (int j = blocks.begin; j < blocks.end; ++j) {
      const SharedAddress full = shared.full(state.stage);
      barrier_wait(shared.empty(state.stage), state.phase ^ 1);
      barrier_arrive_and_expect(full, Tile::kStageBytes);
      for (int i = 0; i < 2; ++i)
        copy_tile<Tile::kHeadDim, Tile::kRows>(shared.read(state.stage, i), &maps.read[i], full, j * Tile::kRows, h, b);
      if (kKeys) {
        const int64_t row = int64_t{tile.head} * statistics_rows(sizes.q_len) + int64_t{j} * Tile::kRows;
        copy_bytes(shared.statistics(state.stage), statistics + row * kStatistics, Tile::kStatisticsBytes, full);
      }
      if (j == blocks.begin) {
        // The first block of a new tile may come before the last one is done with.
        barrier_wait(shared.owned_empty(), (round & 1) ^ 1);
        barrier_arrive_and_expect(shared.owned_full(), 2 * Tile::kOwnedBytes);
        for (int i = 0; i < 2; ++i)
          copy_tile<Tile::kHeadDim, Tile::kOwned, Tile::kRows>(shared.owned(i), &maps.owned[i], shared.owned_full(),
                                                               first, h, b);
      }
      state.advance();
    }
  }
}

}  // namespace cuda
}  // namespace fastgpt
