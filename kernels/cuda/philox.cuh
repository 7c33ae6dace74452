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

__device__ inline PhiloxWords philox(uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

struct Dropout {
  uint32_t key0, key1;
  uint32_t threshold;  // 0 .. 65536
  float scale;         // of what is kept

  // Bit s: whether slot s of this counter is kept.
  __device__ uint32_t keep(uint32_t c0, uint32_t c1, uint32_t c2) const {
    const PhiloxWords words = philox(key0, key1, c0, c1, c2, 0);
    uint32_t bits = 0;
#pragma unroll
    for (int slot = 0; slot < 8; ++slot) {
      const uint32_t word = words.values[slot / 2];
      const uint32_t number = slot % 2 ? word >> 16 : word & 0xffffu;
      bits |= static_cast<uint32_t>(number >= threshold) << slot;
    }
    return bits;
  }
};

}  // namespace cuda
}  // namespace fastgpt
