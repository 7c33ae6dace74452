// Products of a few inputs with a packed matrix: bfloat16, 8 bits or 4 bits a weight.
//
//   y[m][n] (+)= sum over k of W[n][k] x[m][k] + bias[n],   n = begin .. end - 1
//
// Packed: 16 output rows make a tile, and lane = output row, so that nothing is added across lanes and the scales of a
// group are a vector. A tile is a sequence of groups of 32 inputs; n_out and n_in are filled up with 0. In a group:
//
//   bfloat16   16 lines of 64 bytes: inputs 2 i (lower halves) and 2 i + 1 (upper halves) of 16 rows
//   int8        8 lines: inputs 4 i .. 4 i + 3 of 16 rows
//   int4        4 lines: inputs 8 i .. 8 i + 3 (lower halves of the bytes) and 8 i + 4 .. 8 i + 7 (upper) of 16 rows
//
// with a scale for each row of a group beside it, the upper half of a float32. 16, 8.5 and 4.5 bits a weight.
// The inputs are packed too: group by group, in a group entry by entry, 32 float32 numbers, or 32 bytes with a scale
// (largest magnitude / 127) and their sum. Weights and inputs are multiplied as integers and added exactly within a
// group; groups are added in float32 in their order. So y is the same whatever the other entries and the threads are.
//
// Work: four tiles at a time, a quarter of the range apart: four streams, as in decoder_rows.h. A group of each tile is
// multiplied with all inputs before the next is read, so memory gives each weight once, however many inputs there are;
// the sums wait in L1. Bytes: W once.
//
// Measured on 2 cores of an AMD EPYC (Zen 3); "ahead": fetched by hand. One input, all of GPT-2 124M, of what a plain
// sum read in the same run: bfloat16 0.94, int8 0.93, int4 (head int8) 0.90. Several inputs, 1 thread, GFLOP/s (FMA
// peak 100):
//   bfloat16, 4 inputs, each weight vector with all inputs in turn   52: GCC spills two sums
//   bfloat16, 4 inputs, each input with all weight vectors in turn   88
//   bfloat16, 4, 8, 16, 32 inputs, matrix in memory                  75, 71, 77, 82; 2 kB ahead 48, 58, 64, 74
//   int8 the same                                                    112, 113, 117, 116; ahead 100, 94, 104, 110
//   int8, signs taken off the weights once for all inputs (AVX2)     8 inputs 0.95 of it, 16 1.04, 24 1.04 to 1.10,
//                                                                    64 1.12, 512 1.12; the instructions allow 1.16
//   int8, inputs packed 8 rows at a time and 32 bytes a store        packing 6.9 -> 2.7 % of the products of 512 inputs
//   the same, outputs fetched ahead, or inputs 64 at a time in memory   no difference
#pragma once

#include "decoder_args.h"
#include "decoder_rows.h"
#include "simd.h"
#include "simd_int8.h"
#include "small_gemm.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kTileVectors = kTileRows / kLanes;
// Inputs at a time: their sums fill the registers.
constexpr int kTileInputs = kLanes == 16 ? 8 : kLanes == 8 ? 4 : 2;
// Inputs whose sums fit L1.
constexpr int64_t kTileBatch = 64;

static inline int64_t groups_of(int64_t n_in) { return (n_in + kScaleGroup - 1) / kScaleGroup; }
static inline int64_t tiles_of(int64_t n_out) { return (n_out + kTileRows - 1) / kTileRows; }

// Bytes of one group of a tile.
static inline int64_t group_bytes(WeightFormat format) {
  const int64_t weights = kTileRows * kScaleGroup;
  return format == WeightFormat::kBFloat16 ? weights * 2 : format == WeightFormat::kInt8 ? weights : weights / 2;
}

// Inputs of a packed matrix: group-major, see above.
struct PackedInputs {
  float* numbers;  // (groups, count, 32), for bfloat16
  int8_t* bytes;   // (groups, count, 32), for int8 and int4
  float* scales;   // (groups, count)
  int32_t* sums;   // (groups, count)

  // Place for `count` inputs of n_in numbers, from `base` on; 4-byte numbers are counted.
  static int64_t floats(int64_t n_in, int64_t count) { return groups_of(n_in) * count * kScaleGroup; }

  static PackedInputs at(float* base, int64_t n_in, int64_t count) {
    const int64_t lines = groups_of(n_in) * count;
    float* scales = base + lines * kScaleGroup / 4;
    return {base, reinterpret_cast<int8_t*>(base), scales, reinterpret_cast<int32_t*>(scales + lines)};
  }
};

// Packs one group of one input, `have` numbers.
static void pack_line(const PackedInputs& to, WeightFormat format, const float* from, int64_t have, int64_t line) {
  float padded[kScaleGroup];
  if (have < kScaleGroup) {
    memset(padded, 0, sizeof padded);
    memcpy(padded, from, have * sizeof(float));
    from = padded;
  }
  if (format == WeightFormat::kBFloat16) {
    memcpy(to.numbers + line * kScaleGroup, from, sizeof padded);
    return;
  }
  // A scale that is NaN makes the output NaN.
  const Quantised quantised = quantise(to.bytes + line * kScaleGroup, from, kScaleGroup);
  to.scales[line] = quantised.scale;
  to.sums[line] = quantised.sum;
}

// Packs the groups first .. last - 1 of x (count, n_in), a few inputs at a time, so that each is read as it lies.
static void pack_inputs(const PackedInputs& to, WeightFormat format, const float* x, int64_t n_in, int64_t count,
                        int64_t first, int64_t last) {
  constexpr int64_t kTogether = 8;
  for (int64_t m0 = 0; m0 < count; m0 += kTogether)
    for (int64_t group = first; group < last; ++group)
      for (int64_t m = m0; m < min(m0 + kTogether, count); ++m) {
        const int64_t k = group * kScaleGroup;
        pack_line(to, format, x + m * n_in + k, min(kScaleGroup, n_in - k), group * count + m);
      }
}

// Where R tiles and their sums lie: each a constant distance from the one before.
struct TilePlaces {
  float* sums;             // (R, kTileBatch, kTileRows)
  const uint8_t* weights;  // R groups, weight_distance apart
  const uint16_t* scales;  // R times kTileRows, scale_distance apart; null without scales
  int64_t weight_distance, scale_distance;

  FASTGPT_INLINE float* sum(const TilePlaces& p, int r, int m, int v) {
    return p.sums + (r * kTileBatch + m) * kTileRows + v * kLanes;
  }
};

#define FASTGPT_FOR(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); ++i)

// A group of R tiles times M inputs, which begin at `line` of x.
struct Bf16Tile {
  template <int R, int M>
  FASTGPT_INLINE void add_group(const TilePlaces& p, const PackedInputs& x, int64_t line) {
    VecF acc[R][M][kTileVectors];
    FASTGPT_FOR(r, R) FASTGPT_FOR(m, M) FASTGPT_FOR(v, kTileVectors) acc[r][m][v] = load(TilePlaces::sum(p, r, m, v));
    const float* numbers = x.numbers + line * kScaleGroup;
    for (int64_t k = 0; k < kScaleGroup; k += 2) {
      FASTGPT_FOR(half, 2) {
        VecF w[R][kTileVectors];
        FASTGPT_FOR(r, R) FASTGPT_FOR(v, kTileVectors) {
          const VecU pair = (VecU)load_bytes(p.weights + r * p.weight_distance + k * kTileRows * 2 + v * kLanes * 4);
          w[r][v] = float_of(half == 0 ? pair << 16 : pair & 0xffff0000u);
        }
        FASTGPT_FOR(m, M) {
          const VecF input = splat(numbers[m * kScaleGroup + k + half]);
          FASTGPT_FOR(r, R) FASTGPT_FOR(v, kTileVectors) acc[r][m][v] += w[r][v] * input;
        }
      }
    }
    FASTGPT_FOR(r, R) FASTGPT_FOR(m, M) FASTGPT_FOR(v, kTileVectors) store(TilePlaces::sum(p, r, m, v), acc[r][m][v]);
  }
};

template <class Sum>
struct IntegerTile {
  template <int R, int M>
  FASTGPT_INLINE void add_group(const TilePlaces& p, const PackedInputs& x, int64_t line) {
    constexpr bool kHalves = std::is_same_v<Sum, Int4Sum>;
    constexpr int64_t kInputsPerLine = kHalves ? 8 : 4;
    Sum integers[R][M][kTileVectors];
    FASTGPT_FOR(r, R) FASTGPT_FOR(m, M) FASTGPT_FOR(v, kTileVectors) integers[r][m][v] = Sum::start(x.sums[line + m]);
    const int8_t* bytes = x.bytes + line * kScaleGroup;
#pragma GCC unroll 2
    for (int64_t k = 0; k < kScaleGroup; k += kInputsPerLine) {
      FASTGPT_FOR(half, kInputsPerLine / 4) {
        VecB w[R][kTileVectors];
        FASTGPT_FOR(r, R) FASTGPT_FOR(v, kTileVectors) {
          w[r][v] = load_bytes(p.weights + r * p.weight_distance + k / kInputsPerLine * 64 + v * kLanes * 4);
          if constexpr (kHalves) w[r][v] = (half == 0 ? w[r][v] : (VecB)((VecU)w[r][v] >> 4)) & 0x0f;
        }
        FASTGPT_FOR(m, M) {
          const VecB input = splat_bytes(bytes + m * kScaleGroup + k + 4 * half);
          FASTGPT_FOR(r, R) FASTGPT_FOR(v, kTileVectors) integers[r][m][v].add(w[r][v], input);
        }
      }
    }
    FASTGPT_FOR(r, R) FASTGPT_FOR(v, kTileVectors) {
      const VecF scale = load(reinterpret_cast<const Bf16*>(p.scales + r * p.scale_distance) + v * kLanes);
      FASTGPT_FOR(m, M) {
        float* place = TilePlaces::sum(p, r, m, v);
        store(place, load(place) + to_float(integers[r][m][v].finish()) * (scale * splat(x.scales[line + m])));
      }
    }
  }
};

#if defined(FASTGPT_SPLIT_INT8)
// From so many inputs on, taking weights of 8 bits apart pays.
constexpr int64_t kSplitInputs = 24;

// A group of one tile of 8-bit weights, taken apart.
struct SplitGroup {
  static constexpr int kSteps = kScaleGroup / 4;
  SplitWeights weights[kSteps][kTileVectors];
  VecI offsets[kTileVectors];
  VecF scales[kTileVectors];

  SplitGroup(const uint8_t* bytes, const uint16_t* scale_bits) {
    FASTGPT_FOR(v, kTileVectors) {
      offsets[v] = VecI{};
      scales[v] = load(reinterpret_cast<const Bf16*>(scale_bits) + v * kLanes);
    }
    for (int step = 0; step < kSteps; ++step) FASTGPT_FOR(v, kTileVectors) {
        weights[step][v] = SplitWeights::of(load_bytes(bytes + step * 64 + v * kLanes * 4));
        offsets[v] += weights[step][v].offset();
      }
  }

  // sums (M, kTileRows) += the group times M inputs, which begin at `line` of x.
  template <int M>
  inline __attribute__((always_inline)) void add(float* sums, const PackedInputs& x, int64_t line) const {
    VecI integers[M][kTileVectors];
    FASTGPT_FOR(m, M) FASTGPT_FOR(v, kTileVectors) integers[m][v] = offsets[v];
    const int8_t* bytes = x.bytes + line * kScaleGroup;
#pragma GCC unroll 2
    for (int step = 0; step < kSteps; ++step) {
      FASTGPT_FOR(m, M) {
        const VecB input = splat_bytes(bytes + m * kScaleGroup + 4 * step);
        FASTGPT_FOR(v, kTileVectors) integers[m][v] += weights[step][v].products(input);
      }
    }
    FASTGPT_FOR(m, M) FASTGPT_FOR(v, kTileVectors) {
      float* place = sums + m * kTileRows + v * kLanes;
      store(place, load(place) + to_float(integers[m][v]) * (scales[v] * splat(x.scales[line + m])));
    }
  }
};
#endif

// Calls body(m, number) for groups of inputs, number a compile-time constant.
template <class Body>
FASTGPT_INLINE void for_inputs(int64_t count, Body body) {
  int64_t m = 0;
  for (; m + kTileInputs <= count; m += kTileInputs) body(m, std::integral_constant<int, kTileInputs>{});
  if constexpr (kTileInputs > 4)
    if (m + 4 <= count) body(m, std::integral_constant<int, 4>{}), m += 4;
  if constexpr (kTileInputs > 2)
    if (m + 2 <= count) body(m, std::integral_constant<int, 2>{}), m += 2;
  if (m < count) body(m, std::integral_constant<int, 1>{});
}

// Tiles tile, tile + distance, ..., R of them, times all inputs; rows from `end` on are not written.
template <class Tile, int R>
static void multiply_few_tiles(const Output& out, const DecoderMatrix& matrix, const PackedInputs& x, int64_t count,
                               int64_t tile, int64_t distance, int64_t end) {
  const int64_t groups = groups_of(matrix.n_in), bytes = group_bytes(matrix.format);
  const bool scaled = matrix.format != WeightFormat::kBFloat16;
  alignas(64) float sums[R][kTileBatch * kTileRows];
  for (int64_t m0 = 0; m0 < count; m0 += kTileBatch) {
    const int64_t inputs = min(kTileBatch, count - m0);
    for (int r = 0; r < R; ++r) memset(sums[r], 0, inputs * kTileRows * sizeof(float));
    for (int64_t group = 0; group < groups; ++group) {
#if defined(FASTGPT_SPLIT_INT8)
      if (std::is_same_v<Tile, IntegerTile<Int8Sum>> && inputs >= kSplitInputs) {
        for (int r = 0; r < R; ++r) {
          const int64_t place = (tile + r * distance) * groups + group;
          const SplitGroup split(static_cast<const uint8_t*>(matrix.data) + place * bytes,
                                 matrix.scales + place * kTileRows);
          for_inputs(inputs, [&](int64_t m, auto number) {
            split.add<decltype(number)::value>(sums[r] + m * kTileRows, x, group * count + m0 + m);
          });
        }
        continue;
      }
#endif
      for_inputs(inputs, [&](int64_t m, auto number) {
        constexpr int kInputs = decltype(number)::value;
        constexpr int kTogether = kTileInputs / kInputs < R ? kTileInputs / kInputs : R;
        for (int r = 0; r < R; r += kTogether) {
          const int64_t place = (tile + r * distance) * groups + group;
          const TilePlaces places = {sums[r] + m * kTileRows, static_cast<const uint8_t*>(matrix.data) + place * bytes,
                                     scaled ? matrix.scales + place * kTileRows : nullptr, distance * groups * bytes,
                                     distance * groups * kTileRows};
          Tile::template add_group<kTogether, kInputs>(places, x, group * count + m0 + m);
        }
      });
    }
    for (int r = 0; r < R; ++r) {
      const int64_t n = (tile + r * distance) * kTileRows, rows = min(kTileRows, end - n);
      for (int64_t m = 0; m < inputs; ++m) Output::put_rows(out, m0 + m, n, sums[r] + m * kTileRows, rows);
    }
  }
}

template <class Tile>
static void multiply_tiles_of(const Output& out, const DecoderMatrix& matrix, const PackedInputs& x, int64_t count,
                              int64_t begin, int64_t end) {
  const int64_t first = begin / kTileRows, last = tiles_of(end), part = (last - first) / kStreams;
  for (int64_t tile = first; tile < first + part; ++tile)
    multiply_few_tiles<Tile, kStreams>(out, matrix, x, count, tile, part, end);
  for (int64_t tile = first + kStreams * part; tile < last; ++tile)
    multiply_few_tiles<Tile, 1>(out, matrix, x, count, tile, 0, end);
}

// Rows begin .. end, begin a multiple of kTileRows and end too unless it is n_out, with `count` inputs.
static void multiply_tiles(const Output& out, const DecoderMatrix& matrix, const PackedInputs& x, int64_t count,
                           int64_t begin, int64_t end) {
  if (matrix.format == WeightFormat::kBFloat16) multiply_tiles_of<Bf16Tile>(out, matrix, x, count, begin, end);
  if (matrix.format == WeightFormat::kInt8) multiply_tiles_of<IntegerTile<Int8Sum>>(out, matrix, x, count, begin, end);
  if (matrix.format == WeightFormat::kInt4) multiply_tiles_of<IntegerTile<Int4Sum>>(out, matrix, x, count, begin, end);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
