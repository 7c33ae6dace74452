// Sums of products of 8-bit and 4-bit integers, four to a lane: beside simd.h the only file that names instructions.
//
//   Int8Sum   w from -127 to 127, x from -127 to 127
//   Int4Sum   w from 0 to 15, standing for -8 to 7, x from -127 to 127
//
// Both take vectors of bytes, lane l holding four of them, and add w . x to lane l. `x_sum` is the sum of all x that a
// lane will see: some instructions need one factor unsigned, so they take w + 128 (w + 8) and give back 128 (8) times
// that sum.
//
//   AVX2      vpmaddubsw of |w| and x with the sign of w: 2 * 127 * 127 < 2^15, so nothing saturates; vpmaddwd adds
//   pairs
//             of 4 bits 8 steps fit 16-bit sums: 8 * 2 * 15 * 127 < 2^15
//   AVX-512   the same with a mask for the sign; with VNNI vpdpbusd does it all
#pragma once

#include "simd.h"

namespace fastgpt {
namespace FASTGPT_ISA {

typedef int8_t VecB __attribute__((vector_size(kLanes * 4)));
typedef uint8_t VecUB __attribute__((vector_size(kLanes * 4)));
typedef int16_t VecS __attribute__((vector_size(kLanes * 4)));

FASTGPT_INLINE VecB load_bytes(const void* p) {
  VecB x;
  memcpy(&x, p, sizeof x);
  return x;
}

// The same four bytes in every lane.
FASTGPT_INLINE VecB splat_bytes(const void* p) {
  int32_t four;
  memcpy(&four, p, sizeof four);
  return (VecB)(VecI{} + four);
}

FASTGPT_INLINE VecI splat_int(int32_t x) { return VecI{} + x; }

FASTGPT_INLINE VecF to_float(VecI x) {
#if defined(__AVX512F__) && !defined(FASTGPT_LANES)
  return (VecF)_mm512_maskz_cvtepi32_ps(0xffff, (__m512i)x);
#elif defined(__AVX2__) && !defined(FASTGPT_LANES)
  return (VecF)_mm256_cvtepi32_ps((__m256i)x);
#else
  return __builtin_convertvector(x, VecF);
#endif
}

// To the nearest integer, ties to even, for |x| < 2^22.
FASTGPT_INLINE VecI to_int(VecF x) {
  const float round_to_int = 12582912.0f;
  return (VecI)bits_of(x + round_to_int) - (VecI)bits_of(splat(round_to_int));
}

// Stores integers from -128 to 127 as bytes.
constexpr int64_t kStoredBytes = 32;
FASTGPT_INLINE void store_bytes(int8_t* to, const VecI (&x)[kStoredBytes / kLanes]) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(FASTGPT_LANES)
  const __m256i low = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)x[2], (__m256i)x[3]);
  // Packing works within halves: then their quarters are put in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
#else
  for (int64_t i = 0; i < kStoredBytes; i += kLanes) {
    const VecI8 bytes = __builtin_convertvector(x[i / kLanes], VecI8);
    memcpy(to + i, &bytes, sizeof bytes);
  }
#endif
}

struct Quantised {
  float scale;
  int32_t sum;  // of the whole numbers
};

// n numbers as whole ones from -127 to 127 times a scale: the largest magnitude / 127. A number that is NaN or infinite
// makes the scale NaN. n up to 2^16, for the sum to be exact.
FASTGPT_INLINE Quantised quantise(int8_t* to, const float* from, int64_t n) {
  VecF largest = {}, not_finite = {}, sum = {};
  for_lanes(n, [&](int64_t i, int64_t count) {
    const VecF number = load_lanes(from + i, count);
    largest = max(largest, max(number, -number));
    not_finite += number * 0.0f;
  });
  const float scale = reduce_max(largest) / 127.0f + reduce_add(not_finite);
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  const auto whole = [&](VecF number) {
    const VecI q = to_int(min(max(number * inverse, splat(-127.0f)), splat(127.0f)));
    sum += to_float(q);
    return q;
  };
  int64_t i = 0;
  for (; i + kStoredBytes <= n; i += kStoredBytes) {
    VecI q[kStoredBytes / kLanes];
    for (int64_t v = 0; v < kStoredBytes / kLanes; ++v) q[v] = whole(load(from + i + v * kLanes));
    store_bytes(to + i, q);
  }
  for (; i < n; i += kLanes) {
    const int64_t count = min(n - i, static_cast<int64_t>(kLanes));
    const VecI8 bytes = __builtin_convertvector(whole(load_lanes(from + i, count)), VecI8);
    memcpy(to + i, &bytes, count);
  }
  // What a NaN became may be too large for an integer.
  return {scale, scale == scale ? static_cast<int32_t>(reduce_add(sum)) : 0};
}

// Adds the four products of a lane, byte by byte: for instruction sets without a better way.
FASTGPT_INLINE VecI add_products(VecI sum, VecB w, VecB x) {
  const VecI a = (VecI)w, b = (VecI)x;
  return sum + (a >> 24) * (b >> 24) + ((a << 8) >> 24) * ((b << 8) >> 24) + ((a << 16) >> 24) * ((b << 16) >> 24) +
         ((a << 24) >> 24) * ((b << 24) >> 24);
}

#if defined(__AVX512VNNI__) && !defined(FASTGPT_LANES)

struct Int8Sum {
  VecI sum;
  FASTGPT_INLINE Int8Sum start(int32_t x_sum) { return {splat_int(-128 * x_sum)}; }
  inline __attribute__((always_inline)) void add(VecB w, VecB x) {
    sum = (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)((VecUB)w ^ 0x80), (__m512i)x);
  }
  inline __attribute__((always_inline)) VecI finish() const { return sum; }
};

struct Int4Sum {
  VecI sum;
  FASTGPT_INLINE Int4Sum start(int32_t x_sum) { return {splat_int(-8 * x_sum)}; }
  inline __attribute__((always_inline)) void add(VecB w, VecB x) {
    sum = (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
  }
  inline __attribute__((always_inline)) VecI finish() const { return sum; }
};

#elif defined(__AVX2__) && !defined(FASTGPT_LANES)

// Pairs of products of unsigned and signed bytes, and pairs of 16-bit numbers.
#if defined(__AVX512BW__)
FASTGPT_INLINE VecS multiply_pairs(VecB w, VecB x) {
  return (VecS)_mm512_maskz_maddubs_epi16(0xffffffffu, (__m512i)w, (__m512i)x);
}
FASTGPT_INLINE VecI add_pairs(VecS x) {
  return (VecI)_mm512_maskz_madd_epi16(0xffff, (__m512i)x, _mm512_set1_epi16(1));
}
FASTGPT_INLINE VecB magnitude(VecB w) { return (VecB)_mm512_maskz_abs_epi8(~0ull, (__m512i)w); }
FASTGPT_INLINE VecB with_sign_of(VecB x, VecB w) {
  return (VecB)_mm512_mask_sub_epi8((__m512i)x, _mm512_movepi8_mask((__m512i)w), _mm512_setzero_si512(), (__m512i)x);
}
#else
FASTGPT_INLINE VecS multiply_pairs(VecB w, VecB x) { return (VecS)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
FASTGPT_INLINE VecI add_pairs(VecS x) { return (VecI)_mm256_madd_epi16((__m256i)x, _mm256_set1_epi16(1)); }
FASTGPT_INLINE VecB magnitude(VecB w) { return (VecB)_mm256_abs_epi8((__m256i)w); }
FASTGPT_INLINE VecB with_sign_of(VecB x, VecB w) { return (VecB)_mm256_sign_epi8((__m256i)x, (__m256i)w); }
#endif

struct Int8Sum {
  VecI sum;
  FASTGPT_INLINE Int8Sum start(int32_t) { return {VecI{}}; }
  inline __attribute__((always_inline)) void add(VecB w, VecB x) {
    sum += add_pairs(multiply_pairs(magnitude(w), with_sign_of(x, w)));
  }
  inline __attribute__((always_inline)) VecI finish() const { return sum; }
};

// Weights of 8 bits taken apart for many inputs: |w|, and -1 where w is negative, else 0. -x is ~x + 1, so the sum of
// |w| over the negative w belongs to every input's sum, and one instruction of the multiplier is saved in three.
// |w| ~x does not saturate either: 2 * 127 * 128 < 2^15.
#define FASTGPT_SPLIT_INT8 1
struct SplitWeights {
  VecB size, negative;
  FASTGPT_INLINE SplitWeights of(VecB w) { return {magnitude(w), (VecB)(w < 0)}; }
  inline __attribute__((always_inline)) VecI offset() const {
    return add_pairs(multiply_pairs(size & negative, VecB{} + 1));
  }
  inline __attribute__((always_inline)) VecI products(VecB x) const {
    return add_pairs(multiply_pairs(size, x ^ negative));
  }
};

// At most 8 steps.
struct Int4Sum {
  VecS pairs;
  VecI offset;
  FASTGPT_INLINE Int4Sum start(int32_t x_sum) { return {VecS{}, splat_int(-8 * x_sum)}; }
  inline __attribute__((always_inline)) void add(VecB w, VecB x) { pairs += multiply_pairs(w, x); }
  inline __attribute__((always_inline)) VecI finish() const { return add_pairs(pairs) + offset; }
};

#else

struct Int8Sum {
  VecI sum;
  FASTGPT_INLINE Int8Sum start(int32_t) { return {VecI{}}; }
  inline __attribute__((always_inline)) void add(VecB w, VecB x) { sum = add_products(sum, w, x); }
  inline __attribute__((always_inline)) VecI finish() const { return sum; }
};

struct Int4Sum {
  VecI sum;
  FASTGPT_INLINE Int4Sum start(int32_t x_sum) { return {splat_int(-8 * x_sum)}; }
  inline __attribute__((always_inline)) void add(VecB w, VecB x) { sum = add_products(sum, w, x); }
  inline __attribute__((always_inline)) VecI finish() const { return sum; }
};

#endif

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
