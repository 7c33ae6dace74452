// Packs a float32 matrix into the tiles of decoder_tiles.h.
//
//   bfloat16   to nearest, ties to even
//   int8       w ~ scale q, q from -127 to 127: scale = largest magnitude of the group / 127
//   int4       w ~ scale q, q from -8 to 7: of a few scales the one with the smallest squared error; the number of
//              largest magnitude becomes about -8, so that all sixteen values are used
//
// A scale is stored as the upper half of a float32, and the weights are rounded to multiples of what is stored.
// Work: the threads share the tiles. Bytes: the matrix once, the tiles once.
#pragma once

#include "decoder_tiles.h"
#include "parallel.h"

namespace fastgpt {
namespace FASTGPT_ISA {

FASTGPT_INLINE float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}

FASTGPT_INLINE uint16_t float_to_bf16(float x) {
  Bf16 rounded[kLanes];
  store(rounded, splat(x));
  return rounded[0].bits;
}

// Sums over a row of 32 of w q and q q, with q = w / scale rounded and clamped to 4 bits.
FASTGPT_INLINE void int4_fit(const float* w, float inverse, float& wq, float& qq) {
  VecF wq_sum = {}, qq_sum = {};
  for (int64_t i = 0; i < kScaleGroup; i += kLanes) {
    const VecF x = load(w + i);
    const VecF q = to_float(to_int(min(max(x * inverse, splat(-8.0f)), splat(7.0f))));
    wq_sum += x * q;
    qq_sum += q * q;
  }
  wq = reduce_add(wq_sum);
  qq = reduce_add(qq_sum);
}

// For q fixed, the best scale is wq / qq, and the squared error is then ww - wq^2 / qq.
static float int4_scale(const float* w, float extreme) {
  float best = 0.0f, best_gain = -1.0f;
  for (const float reach : {-8.0f, -7.6f, -7.2f, -6.8f, -8.5f}) {
    float wq, qq;
    int4_fit(w, reach / extreme, wq, qq);
    if (qq > 0.0f && wq * wq > best_gain * qq) best_gain = wq * wq / qq, best = wq / qq;
  }
  return best;
}

// The scale of a row's group and its 32 weights as integers; a group of zeros has scale 0.
static uint16_t quantise_group(int8_t* q, const float* w, WeightFormat format) {
  float extreme = 0.0f;
  for (int64_t i = 0; i < kScaleGroup; ++i)
    if ((w[i] < 0 ? -w[i] : w[i]) > (extreme < 0 ? -extreme : extreme)) extreme = w[i];
  const bool four = format == WeightFormat::kInt4;
  const float least = four ? -8.0f : -127.0f, most = four ? 7.0f : 127.0f;
  const float wanted = extreme == 0.0f ? 0.0f
                       : four          ? int4_scale(w, extreme)
                                       : (extreme < 0 ? -extreme : extreme) / 127.0f;
  const uint16_t bits = float_to_bf16(wanted);
  const float scale = bf16_to_float(bits), inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  for (int64_t i = 0; i < kScaleGroup; i += kLanes) {
    const VecI rounded = to_int(min(max(load(w + i) * inverse, splat(least)), splat(most)));
    for (int lane = 0; lane < kLanes; ++lane) q[i + lane] = static_cast<int8_t>(rounded[lane]);
  }
  return bits;
}

// One row's 32 weights of one group into their places in the tile.
static void place_group(uint8_t* tile_group, uint16_t* scales, int64_t row, const float* w, WeightFormat format) {
  if (format == WeightFormat::kBFloat16) {
    Bf16 rounded[kScaleGroup];
    for (int64_t i = 0; i < kScaleGroup; i += kLanes) store(rounded + i, load(w + i));
    for (int64_t i = 0; i < kScaleGroup; i += 2) memcpy(tile_group + i * kTileRows * 2 + row * 4, rounded + i, 4);
    return;
  }
  int8_t q[kScaleGroup];
  scales[row] = quantise_group(q, w, format);
  if (format == WeightFormat::kInt8) {
    for (int64_t i = 0; i < kScaleGroup; i += 4) memcpy(tile_group + i * kTileRows + row * 4, q + i, 4);
    return;
  }
  for (int64_t i = 0; i < kScaleGroup; i += 8)
    for (int64_t j = 0; j < 4; ++j)
      tile_group[i / 2 * kTileRows + row * 4 + j] =
          static_cast<uint8_t>((q[i + j] + 8) | static_cast<uint8_t>((q[i + 4 + j] + 8) << 4));
}

static void decoder_pack(const DecoderPackArgs& a) {
  const int64_t tiles = tiles_of(a.n_out), groups = groups_of(a.n_in), bytes = group_bytes(a.format);
  const int threads = threads_for(a.n_out * a.n_in, 65536, a.num_threads);
  parallel_ranges(tiles * kTileRows, threads, [&](int64_t begin, int64_t end, int) {
    // Whole tiles: the cut is moved up to the next one.
    for (int64_t n = round_up(begin, kTileRows); n < round_up(end, kTileRows); ++n) {
      const int64_t tile = n / kTileRows;
      for (int64_t group = 0; group < groups; ++group) {
        float w[kScaleGroup] = {};
        if (n < a.n_out) {
          const int64_t k = group * kScaleGroup;
          memcpy(w, a.weight + n * a.n_in + k, min(kScaleGroup, a.n_in - k) * sizeof(float));
        }
        uint16_t* scales =
            a.format == WeightFormat::kBFloat16 ? nullptr : a.scales + (tile * groups + group) * kTileRows;
        place_group(a.data + (tile * groups + group) * bytes, scales, n % kTileRows, w, a.format);
      }
    }
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
