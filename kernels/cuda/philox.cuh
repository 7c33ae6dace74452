// The dropout mask, drawn where it is needed: the scheme of fastgpt/ops/philox.py and kernels/cpu/philox.h.
//
//   key      seed, low and high 32 bits
//   counter  c0 = (j / 64) * 8 + j % 8,  c1 = i,  c2 = b * n_heads + h,  c3 = 0        for element (b, h, i, j)
//   column   j = 64 * (j / 64) + 8 * slot + j % 8 takes slot / 2 of the four words: its low 16 bits when slot is even,
//            else the high ones
//   kept     when this 16-bit number >= threshold
//
// Eight columns that lie 8 apart are what a lane holds of 64 columns in the accumulators of mma: no draw is shared.
// Paper: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
#pragma once

#include "common.cuh"

namespace fastgpt {
namespace cuda {

struct PhiloxWords {
  uint32_t values[4];
};

// The keys of the ten rounds. As a kernel's parameter they are operands in constant memory; made from the seed in the
// kernel they would take 20 registers, or an addition each.
struct PhiloxKeys {
  uint32_t low[10], high[10];

  __host__ __device__ PhiloxKeys(uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
      low[round] = k0 + static_cast<uint32_t>(round) * 0x9E3779B9u;
      high[round] = k1 + static_cast<uint32_t>(round) * 0xBB67AE85u;
    }
  }
};

__device__ inline PhiloxWords philox(const PhiloxKeys& keys, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ keys.low[round];
    c1 = low1;
    c2 = high0 ^ c3 ^ keys.high[round];
    c3 = low0;
  }
  return {{c0, c1, c2, c3}};
}

struct Dropout {
  PhiloxKeys keys;
  uint32_t threshold;  // 0 .. 65536
  float scale;         // of what is kept

  Dropout(uint64_t seed, uint32_t threshold)
      : keys(static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)),
        threshold(threshold),
        scale(threshold < 65536 ? 65536.0f / static_cast<float>(65536 - threshold) : 0.0f) {}

  // Bit s: whether slot s of this counter is kept.
  __device__ uint32_t keep(uint32_t c0, uint32_t c1, uint32_t c2) const {
    const PhiloxWords words = philox(keys, c0, c1, c2, 0);
    uint32_t bits = 0;
#pragma unroll
    for (int slot = 0; slot < 8; ++slot) {
      const uint32_t word = words.values[slot / 2];
      const uint32_t number = slot % 2 ? word >> 16 : word & 0xffffu;
      bits |= static_cast<uint32_t>(number >= threshold) << slot;
    }
    return bits;
  }

  // For a lane's accumulators of two rows, `row` and row + 8, and 64 kGroups columns from that of c0 on: bit
  // 16 group + 8 e + n of kept[half] is column 8 n + e of its group. Two draws at a time: more at once take registers
  // that attention does not have.
  template <int kGroups>
  __device__ void keep_rows(uint32_t (&kept)[2], uint32_t c0, uint32_t row, uint32_t c2) const {
    kept[0] = kept[1] = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < 2 * kGroups; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) kept[half] |= keep(c0 + i / 2 * 8 + i % 2, row + half * 8, c2) << (i * 8);
  }
};

}  // namespace cuda
}  // namespace fastgpt
