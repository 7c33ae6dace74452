// What the sm_90a attention kernels share: which tile a block takes, its copies, the left factor of a product.
#pragma once

#include "attention_tile.cuh"
#include "hopper.cuh"

namespace fastgpt {
namespace cuda {

// A tile of rows of one head: of queries, or of keys.
struct RowTile {
  uint32_t head;  // of all heads
  int block;      // of the head's rows

  // The tile of `rows` of `length` rows that this block takes in a round; kUpwards: the first rows of all heads come
  // first, else the last. False behind the last round.
  template <bool kUpwards>
  __device__ bool find(const AttentionSizes& sizes, int length, int rows, uint32_t round) {
    const uint32_t heads = static_cast<uint32_t>(sizes.batch * sizes.n_heads);
    const uint32_t blocks = static_cast<uint32_t>(length + rows - 1) / rows;
    const uint32_t index = tile_of_round(round, blockIdx.x, gridDim.x);
    head = index % heads;
    block = static_cast<int>(kUpwards ? index / heads : blocks - 1 - index / heads);
    return index < heads * blocks;
  }
};

// One thread: starts the copies of kRows rows of a head from `first` on, kBox at a time. full: expects their bytes.
template <int kD, int kRows, int kBox = kRows>
__device__ inline void copy_tile(SharedAddress to, const TensorMap* map, SharedAddress full, int first, int h, int b) {
#pragma unroll 1
  for (int panel = 0; panel < kD / kPanel; ++panel)
    for (int row = 0; row < kRows; row += kBox)
      copy_box(to + (panel * kRows + row) * kPanelRowBytes, map, full, panel * kPanel, first + row, h, b);
}

// What is the same in all lanes, so that ptxas knows it: descriptors then take uniform registers, and no instruction to
// move each of them there.
__device__ inline uint32_t uniform(uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }

// A warp has read what the barrier guards.
__device__ inline void release(SharedAddress empty) {
  __syncwarp();
  if (threadIdx.x % kWarp == 0) barrier_arrive(empty);
}

// The left factor of a product, from the accumulators of another: the fragment of step s is left[s].
template <class T, int kN>
__device__ inline void round_left(uint32_t (&left)[kN / 2][4], const float (&sums)[kN][4]) {
#pragma unroll
  for (int s = 0; s < kN / 2; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&c)[4] = sums[2 * s + i / 2];
      left[s][i] = pack_pair<T>(c[i % 2 * 2], c[i % 2 * 2 + 1]);
    }
}

}  // namespace cuda
}  // namespace fastgpt
