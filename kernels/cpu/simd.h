// Vectors of float32 for one instruction set: the only file of the CPU kernels that names instructions.
//
// A kernel is written once on VecF and compiled once per instruction set, with FASTGPT_ISA naming the namespace:
//
//   baseline      16 bytes,  4 lanes   SSE2 on x86-64, NEON on Arm, whatever the compiler has elsewhere
//   avx2          32 bytes,  8 lanes   AVX2, FMA
//   avx512        64 bytes, 16 lanes   AVX-512 F, BW, DQ, VL
//   avx512_vnni   64 bytes, 16 lanes   and VNNI: sums of products of whole numbers
//   avx512_bf16   64 bytes, 16 lanes   and BF16
//
// VecF is a vector type of GCC and Clang: + - * / and comparisons are lane by lane, a * b + c becomes one FMA
// (-ffp-contract=fast). Everything here is static and lives in the namespace of its instruction set, so that the linker
// can never give code for a new processor to an old one.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTGPT_ISA
#error "define FASTGPT_ISA, the namespace of the instruction set"
#endif

#define FASTGPT_INLINE static inline __attribute__((always_inline))

namespace fastgpt {

// A bfloat16 number: the upper half of a float32.
struct Bf16 {
  uint16_t bits;
};

namespace FASTGPT_ISA {

#if defined(FASTGPT_LANES)
constexpr int kLanes = FASTGPT_LANES;  // for tests: another width than the instruction set's own
#elif defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float VecF __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(kLanes * 2)));
typedef int8_t VecI8 __attribute__((vector_size(kLanes)));

FASTGPT_INLINE VecF splat(float x) { return x - VecF{}; }
FASTGPT_INLINE VecU bits_of(VecF x) { return (VecU)x; }
FASTGPT_INLINE VecF float_of(VecU x) { return (VecF)x; }
// a < b ? b : a and b < a ? b : a, so that a NaN in a stays. GCC makes two instructions of the choice, not one.
#if defined(FASTGPT_LANES) || !defined(__SSE2__)
FASTGPT_INLINE VecF max(VecF a, VecF b) { return a < b ? b : a; }
FASTGPT_INLINE VecF min(VecF a, VecF b) { return b < a ? b : a; }
#elif defined(__AVX512F__)
FASTGPT_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm512_maskz_max_ps(0xffff, (__m512)b, (__m512)a); }
FASTGPT_INLINE VecF min(VecF a, VecF b) { return (VecF)_mm512_maskz_min_ps(0xffff, (__m512)b, (__m512)a); }
#elif defined(__AVX2__)
FASTGPT_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm256_max_ps((__m256)b, (__m256)a); }
FASTGPT_INLINE VecF min(VecF a, VecF b) { return (VecF)_mm256_min_ps((__m256)b, (__m256)a); }
#else
FASTGPT_INLINE VecF max(VecF a, VecF b) { return (VecF)_mm_max_ps((__m128)b, (__m128)a); }
FASTGPT_INLINE VecF min(VecF a, VecF b) { return (VecF)_mm_min_ps((__m128)b, (__m128)a); }
#endif
FASTGPT_INLINE int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
FASTGPT_INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

FASTGPT_INLINE VecI lane_numbers() {
  VecI lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// x with 0 in every lane from n on.
FASTGPT_INLINE VecF first_lanes(VecF x, int64_t n) { return lane_numbers() < static_cast<int32_t>(n) ? x : VecF{}; }

// ---- load and store: all lanes, or the first n (0 < n < kLanes; the others load as 0) ----

FASTGPT_INLINE VecF load(const float* p) {
  VecF x;
  memcpy(&x, p, sizeof x);
  return x;
}

FASTGPT_INLINE void store(float* p, VecF x) { memcpy(p, &x, sizeof x); }

FASTGPT_INLINE VecF load(const Bf16* p) {
  VecU16 half;
  memcpy(&half, p, sizeof half);
  // One instruction each, where GCC 12 makes five of __builtin_convertvector.
#if defined(__AVX512F__) && !defined(FASTGPT_LANES)
  const VecU wide = (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half);
#elif defined(__AVX2__) && !defined(FASTGPT_LANES)
  const VecU wide = (VecU)_mm256_cvtepu16_epi32((__m128i)half);
#else
  const VecU wide = __builtin_convertvector(half, VecU);
#endif
  return float_of(wide << 16);
}

FASTGPT_INLINE VecF load(const int8_t* p) {
#if defined(__AVX512F__) && !defined(FASTGPT_LANES)
  __m128i bytes;
  memcpy(&bytes, p, sizeof bytes);
  return (VecF)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, bytes));
#elif defined(__AVX2__) && !defined(FASTGPT_LANES)
  return (VecF)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  VecI8 bytes;
  memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, VecF);
#endif
}

// The upper half of each lane is x rounded to bfloat16: to nearest, ties to even; NaN becomes a NaN of all bits.
FASTGPT_INLINE VecU rounded_bits(VecF x) {
  const VecU u = bits_of(x);
  return (u + 0x7fff + ((u >> 16) & 1)) | (VecU)(x != x);
}

FASTGPT_INLINE void store(Bf16* p, VecF x) {
#if defined(__AVX512BF16__) && !defined(FASTGPT_LANES)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(FASTGPT_LANES)
  // Three instructions where GCC 12 makes five of __builtin_convertvector.
  const __m256i bits = (__m256i)(rounded_bits(x) >> 16);
  const __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
#else
  const VecU16 half = __builtin_convertvector(rounded_bits(x) >> 16, VecU16);
#endif
  memcpy(p, &half, sizeof half);
}

template <class T>
FASTGPT_INLINE VecF load_first(const T* p, int64_t n) {
  T padded[kLanes] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
FASTGPT_INLINE void store_first(T* p, VecF x, int64_t n) {
  T padded[kLanes];
  store(padded, x);
  memcpy(p, padded, n * sizeof(T));
}

#if defined(__AVX512F__) && !defined(FASTGPT_LANES)
FASTGPT_INLINE VecF load_first(const float* p, int64_t n) {
  return (VecF)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
FASTGPT_INLINE void store_first(float* p, VecF x, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
}
#elif defined(__AVX2__) && !defined(FASTGPT_LANES)
FASTGPT_INLINE VecF load_first(const float* p, int64_t n) {
  return (VecF)_mm256_maskload_ps(p, (__m256i)(lane_numbers() < static_cast<int32_t>(n)));
}
FASTGPT_INLINE void store_first(float* p, VecF x, int64_t n) {
  _mm256_maskstore_ps(p, (__m256i)(lane_numbers() < static_cast<int32_t>(n)), (__m256)x);
}
#endif

// count lanes, where count is kLanes or the length of a tail.
template <class T>
FASTGPT_INLINE VecF load_lanes(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_first(p, count);
}

template <class T>
FASTGPT_INLINE void store_lanes(T* p, VecF x, int64_t count) {
  count == kLanes ? store(p, x) : store_first(p, x, count);
}

// Calls body(i, count) for i = 0, kLanes, ..., count = kLanes but for the tail. body is inlined twice, so that in the
// main loop count is a constant.
template <class Body>
FASTGPT_INLINE void for_lanes(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, static_cast<int64_t>(kLanes));
  if (i < n) body(i, n - i);
}

// Zeros over `bytes` bytes, past the caches where the instruction set can: for memory that nobody reads soon, as a
// store into a cache first reads the line it will overwrite.
FASTGPT_INLINE void stream_zeros(void* to, int64_t bytes) {
  char* p = static_cast<char*>(to);
#if defined(__SSE2__) && !defined(FASTGPT_LANES)
  constexpr int64_t kBytes = kLanes * 4;
  const int64_t head = min(bytes, -static_cast<int64_t>(reinterpret_cast<uintptr_t>(p)) & (kBytes - 1));
  memset(p, 0, head);
  p += head;
  bytes -= head;
  for (; bytes >= kBytes; p += kBytes, bytes -= kBytes) {
#if defined(__AVX512F__)
    _mm512_stream_ps(reinterpret_cast<float*>(p), _mm512_setzero_ps());
#elif defined(__AVX2__)
    _mm256_stream_ps(reinterpret_cast<float*>(p), _mm256_setzero_ps());
#else
    _mm_stream_ps(reinterpret_cast<float*>(p), _mm_setzero_ps());
#endif
  }
  // Other threads may read what was stored only after this.
  _mm_sfence();
#endif
  memset(p, 0, bytes);
}

// ---- reductions over the lanes ----

FASTGPT_INLINE float reduce_add(VecF x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

FASTGPT_INLINE float reduce_max(VecF x) {
  float lanes[kLanes];
  store(lanes, x);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = lanes[i] < lanes[i + width] ? lanes[i + width] : lanes[i];
  return lanes[0];
}

// Sum of term(i, count) over a row of n. Four accumulators hide the latency of the addition.
template <class Term>
FASTGPT_INLINE float sum_lanes(int64_t n, Term term) {
  VecF a = {}, b = {}, c = {}, d = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    a += term(i, static_cast<int64_t>(kLanes));
    b += term(i + kLanes, static_cast<int64_t>(kLanes));
    c += term(i + 2 * kLanes, static_cast<int64_t>(kLanes));
    d += term(i + 3 * kLanes, static_cast<int64_t>(kLanes));
  }
  for (; i + kLanes <= n; i += kLanes) a += term(i, static_cast<int64_t>(kLanes));
  if (i < n) b += first_lanes(term(i, n - i), n - i);
  return reduce_add((a + b) + (c + d));
}

// ---- exp ----

constexpr float kLog2E = 1.44269504f;

// e^x within 2 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 in r, and n added to the exponent.
// 0 below -87.33 (also for -inf; denormal results are flushed), 2.4e38 above 88.37, NaN stays NaN.
FASTGPT_INLINE VecF exp(VecF x) {
  const VecF low = splat(-87.33654f);
  const VecF clamped = min(max(x, low), splat(88.37626f));
  const float round_to_int = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const VecF shifted = clamped * 1.44269504f + round_to_int;
  const VecF n = shifted - round_to_int;
  const VecF r = clamped - n * 0.693145752f - n * 1.42860677e-6f;
  VecF p = splat(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const VecF power = float_of(bits_of(p) + (bits_of(shifted) << 23));
  return x < low ? VecF{} : (x == x ? power : x);
}

// 2^x within 1 ulp for x <= 126, with one multiplication less than exp and no comparison; NaN stays NaN.
// 0 at and below -126.5, also for -inf: there the exponent of the power of two becomes that of zero.
FASTGPT_INLINE VecF exp2(VecF x) {
  const float round_to_int = 12582912.0f;
  const VecF clamped = max(x, splat(-127.0f));
  const VecF shifted = clamped + round_to_int;
  const VecF r = clamped - (shifted - round_to_int);
  VecF p = splat(1.535334e-4f);
  p = p * r + 1.3398867e-3f;
  p = p * r + 9.6184374e-3f;
  p = p * r + 5.5503325e-2f;
  p = p * r + 0.24022648f;
  p = p * r + 0.6931472f;
  p = p * r + 1.0f;
  return p * float_of((bits_of(shifted) + 127) << 23);
}

// ---- integers ----

// The 64-bit products a * b of unsigned 32-bit numbers, in two halves.
FASTGPT_INLINE void multiply_wide(VecU a, uint32_t b, VecU& high, VecU& low) {
#if defined(__AVX512F__) && !defined(FASTGPT_LANES)
  // The maskz forms, as GCC 12 warns of an uninitialised operand within the others.
  const __m512i factor = _mm512_set1_epi32(static_cast<int>(b));
  const __m512i even = _mm512_maskz_mul_epu32(0xff, (__m512i)a, factor);
  const __m512i odd = _mm512_maskz_mul_epu32(0xff, _mm512_maskz_srli_epi64(0xff, (__m512i)a, 32), factor);
  high = (VecU)_mm512_mask_blend_epi32(0xaaaa, _mm512_maskz_srli_epi64(0xff, even, 32), odd);
  low = (VecU)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_maskz_slli_epi64(0xff, odd, 32));
#elif defined(__AVX2__) && !defined(FASTGPT_LANES)
  const __m256i factor = _mm256_set1_epi32(static_cast<int>(b));
  const __m256i even = _mm256_mul_epu32((__m256i)a, factor);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), factor);
  high = (VecU)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (VecU)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#elif defined(__SSE2__) && !defined(FASTGPT_LANES)
  const __m128i factor = _mm_set1_epi32(static_cast<int>(b));
  const __m128i even = _mm_mul_epu32((__m128i)a, factor);
  const __m128i odd = _mm_mul_epu32(_mm_srli_epi64((__m128i)a, 32), factor);
  const __m128i low_half = _mm_set1_epi64x(0xffffffff);
  high = (VecU)_mm_or_si128(_mm_srli_epi64(even, 32), _mm_andnot_si128(low_half, odd));
  low = (VecU)_mm_or_si128(_mm_and_si128(even, low_half), _mm_slli_epi64(odd, 32));
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * b;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// ---- transpose ----

// Lanes index(0), index(1), ... of a and b side by side, where Index::at(i) is a constant.
template <class Index, int... I>
FASTGPT_INLINE VecF pick_lanes(VecF a, VecF b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Index::at(I)...);
#else
  return __builtin_shuffle(a, b, VecI{Index::at(I)...});
#endif
}

// Of two rows, the blocks of h columns that lie in the first (second) half of every 2 h columns.
template <int h>
struct FirstHalves {
  static constexpr int at(int i) { return i & h ? kLanes + i - h : i; }
};
template <int h>
struct SecondHalves {
  static constexpr int at(int i) { return i & h ? kLanes + i : i + h; }
};

// Transposes a square of kLanes rows: swaps the two off-diagonal quarters, then does so in each quarter.
template <int h = kLanes / 2>
FASTGPT_INLINE void transpose(VecF (&rows)[kLanes]) {
  if constexpr (h > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & h) continue;
      const VecF first = rows[i], second = rows[i + h];
      rows[i] = pick_lanes<FirstHalves<h>>(first, second, lanes);
      rows[i + h] = pick_lanes<SecondHalves<h>>(first, second, lanes);
    }
    transpose<h / 2>(rows);
  }
}

// The sums of the lanes of each row, side by side: halves of two rows at a time are added.
template <int h = kLanes / 2>
FASTGPT_INLINE VecF sum_rows(VecF (&rows)[kLanes]) {
  if constexpr (h == 0) {
    return rows[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 8
    for (int i = 0; i < h; ++i) {
      const VecF first = rows[i], second = rows[i + h];
      rows[i] = pick_lanes<FirstHalves<h>>(first, second, lanes) + pick_lanes<SecondHalves<h>>(first, second, lanes);
    }
    return sum_rows<h / 2>(rows);
  }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
