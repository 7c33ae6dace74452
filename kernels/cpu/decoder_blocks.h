// Products of many inputs with bfloat16 weights: a part of the matrix is unpacked once, then multiplied with all.
//
//   y[m][n] (+)= sum over k of W[n][k] x[m][k] + bias[n],   n = begin .. end - 1
//
// Work: a tile of 16 output rows at a time, kBlockSteps inputs k of it. They are unpacked into a panel of float32,
// [k][16 rows], and each panel of kBlockInputs inputs m, packed side by side by all threads together, is multiplied
// with it in registers, one FMA after the other in the order of k. The sums wait in L1. They are added in the order of
// decoder_tiles.h: the same bits. Bytes: W once.
//
// Measured on 2 cores of an AMD EPYC (Zen 3), GPT-2 124M, against decoder_tiles.h, medians of two programs run after
// each other: a prompt of 512 entries 621 -> 574 ms, a step of 32 entries 51.4 -> 49.5 ms, of 16 entries 27.7 -> 27.8.
// Tried and left out:
//   int8, int4 unpacked into 16-bit integers (vpmaddwd, the same bits)   prompt 497 -> 491 and 398 -> 493 ms, step of
//   32
//                                                                        38.5 -> 38.4 and 33.4 -> 38.8: bytes stay
//   float32 weights, transposed into the panel, against PyTorch          prompt 585 -> 648 ms, with the step's
//   attention
#pragma once

#include "decoder_args.h"
#include "decoder_rows.h"
#include "decoder_tiles.h"
#include "gemm.h"
#include "simd.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// Inputs at a time, and vectors of output rows: their sums fill the registers.
constexpr int kBlockInputs = kGemmRows;
constexpr int kBlockVectors = kTileVectors < 2 ? 1 : 2;
// From so many inputs on, unpacking first pays.
constexpr int64_t kBlockEntries = 24;
constexpr int64_t kBlockSteps = 768;
static_assert(kBlockSteps % kScaleGroup == 0, "a panel ends with a group");

// Inputs in panels of at most kBlockInputs, all of nearly the same width w, input-minor.
struct BlockInputs {
  float* numbers;  // of each panel (n_in, w)
  int64_t n_in, count;

  int64_t panels() const { return ceil_div(count, kBlockInputs); }
  int64_t first(int64_t panel) const { return count * panel / panels(); }
};

static void pack_input_panel(float* packed, const float* x, int64_t n_in, int64_t width) {
  int64_t k = 0;
  // A store reaches into the next step, which is stored later; not beyond the panel, which may be another thread's.
  for (; k + 2 * kLanes <= n_in; k += kLanes) {
    VecF square[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) square[r] = r < width ? load(x + r * n_in + k) : VecF{};
    transpose(square);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) store(packed + (k + r) * width, square[r]);
  }
  for (; k < n_in; ++k)
    for (int64_t m = 0; m < width; ++m) packed[k * width + m] = x[m * n_in + k];
}

// Packs the panels begin .. end - 1 of x (count, n_in).
static void pack_block(const BlockInputs& to, const float* x, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = to.first(panel);
    pack_input_panel(to.numbers + first * to.n_in, x + first * to.n_in, to.n_in, to.first(panel + 1) - first);
  }
}

// What one thread works with: a panel of weights, and the sums of a tile, (count, kTileRows).
struct BlockScratch {
  float *panel, *sums;

  static constexpr int64_t kPanelFloats = kBlockSteps * kTileRows;
  static int64_t floats(int64_t count) { return kPanelFloats + count * kTileRows; }
  static BlockScratch at(float* base) { return {base, base + kPanelFloats}; }
};

// Memory that is fetched while something else is multiplied, `stride` bytes each step.
struct Ahead {
  const uint8_t* place;
  int64_t stride;

  FASTGPT_INLINE void fetch(Ahead& ahead) {
    __builtin_prefetch(ahead.place, 0, 2);
    ahead.place += ahead.stride;
  }
};

static void unpack_bf16(float* panel, const uint8_t* tile, int64_t steps) {
  for (int64_t k = 0; k < steps; k += 2) FASTGPT_FOR(v, kTileVectors) {
      const VecU pair = (VecU)load_bytes(tile + k * kTileRows * 2 + v * kLanes * 4);
      store(panel + k * kTileRows + v * kLanes, float_of(pair << 16));
      store(panel + (k + 1) * kTileRows + v * kLanes, float_of(pair & 0xffff0000u));
    }
}

// sums (M, kTileRows) += inputs (steps, M) times panel, for kBlockVectors vectors of rows.
template <int M>
static void __attribute__((noinline)) add_panel(float* sums, const float* inputs, const float* panel, int64_t steps,
                                                Ahead ahead) {
  VecF acc[M][kBlockVectors];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) FASTGPT_FOR(v, kBlockVectors) acc[m][v] = load(sums + m * kTileRows + v * kLanes);
  // At least one step: with a loop that may be empty, GCC 12 moves every accumulator through memory before and after.
  do {
    VecF w[kBlockVectors];
    FASTGPT_FOR(v, kBlockVectors) w[v] = load(panel + v * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const VecF input = splat(inputs[m]);
      FASTGPT_FOR(v, kBlockVectors) acc[m][v] += w[v] * input;
    }
    inputs += M;
    panel += kTileRows;
    Ahead::fetch(ahead);
  } while (--steps > 0);
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) FASTGPT_FOR(v, kBlockVectors) store(sums + m * kTileRows + v * kLanes, acc[m][v]);
}

// ---- a tile with all inputs ----

template <class Body, int M = kBlockInputs>
FASTGPT_INLINE void with_width(int64_t width, Body body) {
  if (width == M) return body(std::integral_constant<int, M>{});
  if constexpr (M > 1) with_width<Body, M - 1>(width, body);
}

// Calls body(panel, first input, width as a constant, vector of rows) for all panels of inputs.
template <class Body>
FASTGPT_INLINE void for_block_panels(const BlockInputs& x, Body body) {
  for (int64_t panel = 0; panel < x.panels(); ++panel) {
    const int64_t first = x.first(panel);
    with_width(x.first(panel + 1) - first, [&](auto width) {
      for (int v = 0; v < kTileVectors; v += kBlockVectors) body(first, width, v * kLanes);
    });
  }
}

// The tile of rows n .. n + 15.
static void add_tile(const BlockScratch& s, const DecoderMatrix& matrix, const BlockInputs& x, int64_t n) {
  const int64_t n_in = matrix.n_in, tile_bytes = groups_of(n_in) * group_bytes(matrix.format);
  const auto* tile = static_cast<const uint8_t*>(matrix.data) + n / kTileRows * tile_bytes;
  const int64_t calls = x.panels() * (kTileVectors / kBlockVectors);
  for (int64_t k = 0; k < n_in; k += kBlockSteps) {
    const int64_t steps = min(kBlockSteps, n_in - k), bytes = steps * kTileRows * 2;
    const uint8_t* weights = tile + k * kTileRows * 2;
    unpack_bf16(s.panel, weights, round_up(steps, 2));
    // What is unpacked next lies right behind.
    Ahead ahead = {weights + bytes, ceil_div(bytes, calls * steps)};
    for_block_panels(x, [&](int64_t first, auto width, int64_t row) {
      add_panel<decltype(width)::value>(s.sums + first * kTileRows + row, x.numbers + first * n_in + k * width,
                                        s.panel + row, steps, ahead);
      ahead.place += steps * ahead.stride;
    });
  }
}

// Rows begin .. end, begin a multiple of kTileRows.
static void multiply_block(const Output& out, const DecoderMatrix& matrix, const BlockInputs& x,
                           const BlockScratch& scratch, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kTileRows) {
    const int64_t rows = min(kTileRows, end - n);
    memset(scratch.sums, 0, x.count * kTileRows * sizeof(float));
    add_tile(scratch, matrix, x, n);
    for (int64_t m = 0; m < x.count; ++m) Output::put_rows(out, m, n, scratch.sums + m * kTileRows, rows);
  }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
