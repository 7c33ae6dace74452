// Sums of products of 8-bit with 16-bit integers, two to a lane; like simd.h a file that names instructions.
#pragma once

#include "simd.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// Products of one step.
constexpr int64_t kPairStep = 2 * kLanes;

// sum[l] + w[2 l] x[2 l] + w[2 l + 1] x[2 l + 1]. The caller sees to it that no sum leaves 32 bits.
FASTGPT_INLINE VecI add_pair_products(VecI sum, const int8_t* w, const int16_t* x) {
#if defined(__AVX512BW__) && !defined(FASTGPT_LANES)
  __m256i bytes;
  memcpy(&bytes, w, sizeof bytes);
  __m512i inputs;
  memcpy(&inputs, x, sizeof inputs);
  const __m512i weights = _mm512_maskz_cvtepi8_epi16(0xffffffffu, bytes);
#if defined(__AVX512VNNI__)
  return (VecI)_mm512_dpwssd_epi32((__m512i)sum, weights, inputs);
#else
  return sum + (VecI)_mm512_maskz_madd_epi16(0xffff, weights, inputs);
#endif
#elif defined(__AVX2__) && !defined(FASTGPT_LANES)
  __m128i bytes;
  memcpy(&bytes, w, sizeof bytes);
  __m256i inputs;
  memcpy(&inputs, x, sizeof inputs);
  return sum + (VecI)_mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), inputs);
#elif defined(__SSE2__) && !defined(FASTGPT_LANES)
  __m128i inputs;
  memcpy(&inputs, x, sizeof inputs);
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w));
  const __m128i weights = _mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
  return sum + (VecI)_mm_madd_epi16(weights, inputs);
#else
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] += w[2 * lane] * x[2 * lane] + w[2 * lane + 1] * x[2 * lane + 1];
  return sum;
#endif
}

FASTGPT_INLINE int32_t reduce_add(VecI x) {
  int32_t lanes[kLanes], sum = 0;
  memcpy(lanes, &x, sizeof x);
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
