// Arithmetic of the sm_90a kernels: how tiles lie in shared memory, how wgmma is told of them, which tile a block takes
// when, and at which stage and phase of a pipeline a thread stands. No instruction of a GPU: any C++ compiler takes it,
// and the tests run it.
//
// A tile is rows x kD 16-bit numbers, in panels of 64 columns: a panel's row is 128 bytes, and its chunks of 16 bytes
// stand at c ^ (row % 8). This is TMA's and wgmma's 128-byte swizzle; panels begin at multiples of 1024 bytes.
// Source: the PTX manual, "Matrix Descriptor Format", "Shared Memory Matrix Layout", "Swizzling Modes".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastgpt {
namespace cuda {

constexpr int kWarpgroup = 128;      // threads
constexpr int kPanel = 64;           // columns
constexpr int kPanelRowBytes = 128;  // of one row of a panel
constexpr int kSwizzleBytes = 1024;  // after which the pattern repeats: eight rows
constexpr uint64_t kSwizzle128 = 1ull << 62;

// Where a byte of an unswizzled address stands: bits 4 to 6 are XORed with bits 7 to 9.
__host__ __device__ constexpr uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7u) << 4); }

// The 64 bits by which wgmma finds a matrix. leading, stride: bytes, multiples of 16 below 2^18.
//   rows of K (K-major): stride from one group of 8 rows to the next; `leading` is not read, since 16 columns lie
//     within a panel.
//   columns of K (MN-major): stride from one group of 8 rows of K to the next, leading from one panel of 64 columns to
//     the next.
// further: bytes behind the address, still within shared memory. Added behind, so that all steps of a product share the
// rest.
__host__ __device__ constexpr uint64_t descriptor(uint32_t address, uint32_t further, uint32_t leading,
                                                  uint32_t stride) {
  const uint32_t low = ((address & 0x3ffffu) >> 4 | (leading & 0x3ffffu) >> 4 << 16) + (further >> 4);
  return static_cast<uint64_t>((stride & 0x3ffffu) >> 4) << 32 | kSwizzle128 | low;
}

// Rows of a tile as a factor whose columns are summed over: columns 16 step .. 16 step + 15 of all `rows` rows.
__host__ __device__ constexpr uint64_t rows_descriptor(uint32_t tile, int rows, int step) {
  const uint32_t panel = static_cast<uint32_t>(step / 4 * rows * kPanelRowBytes);
  return descriptor(tile, panel + static_cast<uint32_t>(step % 4 * 32), 16, kSwizzleBytes);
}

// A tile as a factor whose rows are summed over: rows 16 step .. 16 step + 15, all columns.
__host__ __device__ constexpr uint64_t columns_descriptor(uint32_t tile, int rows, int step) {
  return descriptor(tile, static_cast<uint32_t>(step * 16 * kPanelRowBytes),
                    static_cast<uint32_t>(rows * kPanelRowBytes), kSwizzleBytes);
}

// A ring of kStages buffers, each with a barrier "full" and a barrier "empty". The phase of a barrier flips each time
// it completes. A reader waits until phase `phase` of full is over, a writer until phase `phase ^ 1` of empty is: the
// one before the first is over from the start.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;

  __host__ __device__ constexpr void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Which tile the block takes in a round: tiles are numbered from the heaviest down, and blocks take them to and fro, so
// that one that got the heaviest of a round gets the lightest of the next. Not below the number of tiles, which leaves
// room for another round below 2^32: the block is done.
__host__ __device__ constexpr uint32_t tile_of_round(uint32_t round, uint32_t block, uint32_t blocks) {
  return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

// The keys that the queries first .. first + queries - 1 see, in blocks of `keys`: every query sees the blocks below
// `full` wholly, and none sees a block from `all` on. No query exists: none and none.
struct KeyBlocks {
  int full, all;
};

__host__ __device__ constexpr KeyBlocks key_blocks(int first, int queries, int keys, int q_len, int k_len) {
  if (first >= q_len) return {0, 0};
  const int offset = k_len - q_len, end = first + queries < q_len ? first + queries : q_len;
  return {(first + offset + 1) / keys, (end + offset + keys - 1) / keys};
}

// Blocks begin .. end - 1, of which those on one side of `split` meet the diagonal.
struct BlockRange {
  int begin, split, end;
};

// The other way round: the blocks of `queries` queries that see any of the keys first .. first + keys - 1. From `split`
// on every query sees every key. No key exists: nothing, at the end.
__host__ __device__ constexpr BlockRange query_blocks(int first, int keys, int queries, int q_len, int k_len) {
  const int offset = k_len - q_len, end = (q_len + queries - 1) / queries;
  if (first >= k_len) return {end, end, end};
  const int begin = (first > offset ? first - offset : 0) / queries, last = first + keys - 1 - offset;
  const int split = last > 0 ? (last + queries - 1) / queries : 0;
  return {begin, split < begin ? begin : split < end ? split : end, end};
}

constexpr int kGradientRows = 64;  // of a block that the backward passes read

// For how many queries of a head the first backward pass leaves statistics behind: those of whole blocks.
__host__ __device__ constexpr int64_t statistics_rows(int64_t q_len) {
  return (q_len + kGradientRows - 1) / kGradientRows * kGradientRows;
}

}  // namespace cuda
}  // namespace fastgpt
