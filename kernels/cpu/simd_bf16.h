// Pairs of bfloat16 numbers, a pair to a lane, and sums of their products; like simd.h a file that names instructions.
//
//   lane l:  sum[l] + a[2 l] b[2 l] + a[2 l + 1] b[2 l + 1]        a, b bfloat16, sum float32
//
// vdpbf16ps is that in one instruction: twice the multiplications of an FMA. It adds the second product first, rounds
// to nearest even after each, takes and gives denormals as 0, and heeds no mode. Elsewhere two multiply-adds do the
// same, but keep denormals.
#pragma once

#include "simd.h"

namespace fastgpt {
namespace FASTGPT_ISA {

#if (defined(__AVX512BF16__) && !defined(FASTGPT_LANES)) || defined(FASTGPT_PAIRS)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

// Two bfloat16 numbers, the first in the low half.
struct Pair {
  uint32_t bits;
};

typedef VecU VecPairs;

FASTGPT_INLINE VecPairs load(const Pair* p) {
  VecPairs x;
  memcpy(&x, p, sizeof x);
  return x;
}

FASTGPT_INLINE void store(Pair* p, VecPairs x) { memcpy(p, &x, sizeof x); }

FASTGPT_INLINE VecPairs splat(Pair x) { return VecPairs{} + x.bits; }

FASTGPT_INLINE VecF add_products(VecF sum, VecPairs a, VecPairs b) {
#if defined(__AVX512BF16__) && !defined(FASTGPT_LANES)
  return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += float_of(a & 0xffff0000u) * float_of(b & 0xffff0000u);
  return sum + float_of(a << 16) * float_of(b << 16);
#endif
}

// Lane by lane the pair of two numbers, rounded as store(Bf16*, x) rounds them.
FASTGPT_INLINE VecPairs make_pairs(VecF first, VecF second) {
#if defined(__AVX512BF16__) && !defined(FASTGPT_LANES)
  // All of first, then all of second; the permutation puts lane by lane side by side.
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const VecI lanes = lane_numbers();
  return (VecPairs)_mm512_maskz_permutexvar_epi16(0xffffffffu, (__m512i)(lanes | (lanes + kLanes) << 16), halves);
#else
  return rounded_bits(first) >> 16 | (rounded_bits(second) & 0xffff0000u);
#endif
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
