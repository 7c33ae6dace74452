// The dropout mask, drawn where it is needed: Philox4x32-10, a generator without state.
//
//   key      seed, low and high 32 bits
//   counter  c0 = (j / 64) * 8 + j % 8,  c1 = i,  c2 = b * n_heads + h,  c3 = 0        for element (b, h, i, j)
//   column   j = 64 * (j / 64) + 8 * slot + j % 8 takes slot / 2 of the four words: its low 16 bits when slot is even,
//            else the high ones
//   kept     when this 16-bit number >= threshold, threshold = round(p * 65536)
//
// fastgpt/ops/philox.py draws the same bits. In attention the lanes of a vector are kLanes queries i of one key j, so
// that one draw serves 8 keys of every lane at any vector width; in a tensor of rows they are columns of one row.
// Paper: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
#pragma once

#include "simd.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// The draws for one head, with the keys of the ten rounds ready in memory: to add them up in every draw cost 2% of the
// softmax. Not as vectors: with vectors wider than the processor's, GCC 12 writes key[0] for key[1].
struct Dropout {
  uint32_t keys[10][2];
  uint32_t head;      // b * n_heads + h
  int32_t threshold;  // 0 .. 65536

  Dropout(uint64_t seed, int64_t head, int32_t threshold) : head(static_cast<uint32_t>(head)), threshold(threshold) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (uint32_t (&key)[2] : keys) {
      key[0] = key0;
      key[1] = key1;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
  }
};

FASTGPT_INLINE void philox(VecU (&c)[4], const uint32_t (&keys)[10][2]) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    VecU high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ keys[round][0];
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ keys[round][1];
    c[3] = low0;
  }
}

// Calls body(j, keep) for every kKeys (1 or 2) keys from j = 0 to n - 1 on, n a multiple of kKeys, of a block whose
// first key, a multiple of 64, is first_key; keep[i] is all ones in the lanes (the queries) for which dropout keeps key
// j + i. Without dropout keep is a constant that vanishes.
template <bool kDropout, int kKeys, class Body>
FASTGPT_INLINE void for_keys(const Dropout& dropout, VecU queries, int64_t first_key, int64_t n, Body body) {
  VecI keep[kKeys];
  if constexpr (!kDropout) {
    for (VecI& all : keep) all = VecI{} - 1;
    for (int64_t j = 0; j < n; j += kKeys) body(j, keep);
  } else {
    for (int64_t group = 0; group < n; group += 64) {
      for (int64_t column = group; column < min(group + 8, n); column += kKeys) {
        VecU words[kKeys][4];
#pragma GCC unroll 2
        for (int i = 0; i < kKeys; ++i) {
          const uint32_t c0 = static_cast<uint32_t>((first_key + group) / 8 + column - group + i);
          words[i][0] = VecU{} + c0;
          words[i][1] = queries;
          words[i][2] = VecU{} + dropout.head;
          words[i][3] = VecU{};
          philox(words[i], dropout.keys);
        }
#pragma GCC unroll 8
        for (int slot = 0; slot < 8; ++slot) {
          const int64_t j = column + 8 * slot;
#pragma GCC unroll 2
          for (int i = 0; i < kKeys; ++i) {
            const VecU word = words[i][slot / 2];
            keep[i] = (VecI)(slot % 2 ? word >> 16 : word & 0xffff) >= dropout.threshold;
          }
          if (j < n) body(j, keep);
        }
      }
    }
  }
}

// Dropout of a tensor of rows (the residual stream, the embeddings): c1 and c2 are the row's number. kDropColumns
// columns at a time, for which the lanes of a draw are consecutive c0.
constexpr int64_t kDropColumns = kLanes > 8 ? 8 * kLanes : 64;

// What the columns of a row are multiplied by: 0, or the scale of what is kept.
struct RowDropout {
  Dropout dropout;
  float scale;

  RowDropout(uint64_t seed, int32_t threshold)
      : dropout(seed, 0, threshold), scale(threshold < 65536 ? 65536.0f / (65536 - threshold) : 0.0f) {}

  // How many floats `factors` must hold for a row of n.
  static int64_t padded(int64_t n) { return (n + kDropColumns - 1) / kDropColumns * kDropColumns; }

  void factors(float* factors, int64_t row, int64_t n) const {
    const VecU c1 = VecU{} + static_cast<uint32_t>(row), c2 = VecU{} + static_cast<uint32_t>(row >> 32);
    for (int64_t first = 0; first < n; first += kDropColumns) {
      // Fewer than 8 lanes need several draws for 8 neighbours, more of them serve several groups of 64 columns.
      for (int64_t part = 0; part < 8; part += kLanes) {
        VecU words[4] = {(VecU)lane_numbers() + static_cast<uint32_t>(first / 8 + part), c1, c2, VecU{}};
        philox(words, dropout.keys);
#pragma GCC unroll 8
        for (int slot = 0; slot < 8; ++slot) {
          const VecU word = words[slot / 2];
          const VecI number = (VecI)(slot % 2 ? word >> 16 : word & 0xffff);
          const VecF factor = number >= dropout.threshold ? splat(scale) : VecF{};
          constexpr int64_t run = kLanes < 8 ? kLanes : 8;
          float lanes[kLanes];
          store(lanes, factor);
          for (int64_t lane = 0; lane < kLanes; lane += run)
            memcpy(factors + first + 8 * lane + 8 * slot + part, lanes + lane, sizeof(float) * run);
        }
      }
    }
  }
};

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
