// Products of small matrices that lie in cache: kMr rows of A times kNr vectors of B, accumulated in registers.
//
//   C[r][n] (+)= sum over k of A[r][k] * B[k][n],   n = 0 .. N * kLanes - 1
//
// A step of k loads N vectors of a row of B, broadcasts kMr numbers of A and does kMr * N FMAs: with AVX2 7 loads for
// 12 FMAs, which keep both units busy for 6 cycles. A is read as it lies, row by row or column by column, B in rows of
// vectors. 4 rows divide every block, so that only the vectors have a tail, and only at head dimensions and diagonals.
#pragma once

#include <type_traits>

#include "simd.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kMr = 4;
// 32 registers with AVX-512, 16 below; the baseline needs one more for every product, as it has no FMA.
constexpr int kNr = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;

FASTGPT_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

enum class Layout { kRows, kColumns };  // of A: A[r][k] is a[r * lda + k] or a[k * lda + r]

template <int N, Layout kLayout>
FASTGPT_INLINE void accumulate(VecF (&acc)[kMr][N], const float* a, int64_t lda, const float* b, int64_t ldb,
                               int64_t k_count) {
  // At least one step: with a loop that may be empty, GCC 12 moves every accumulator through memory before and after.
  int64_t k = 0;
  do {
    VecF row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kMr; ++r) {
      const VecF factor = splat(kLayout == Layout::kRows ? a[r * lda] : a[r]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] += factor * row[n];
    }
    a += kLayout == Layout::kRows ? 1 : lda;
    b += ldb;
  } while (++k < k_count);
}

// C = scale * A B
template <int N, Layout kLayout>
static void product(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k_count,
                    float scale) {
  VecF acc[kMr][N] = {};
  accumulate<N, kLayout>(acc, a, lda, b, ldb, k_count);
#pragma GCC unroll 4
  for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + r * ldc + n * kLanes, acc[r][n] * scale);
  }
}

// C += A B, or C = factors * C + A B with one factor a row when factors is given.
template <int N, Layout kLayout, class Factors>
static void add_product(float* c, int64_t ldc, const float* a, int64_t lda, const float* b, int64_t ldb,
                        int64_t k_count, Factors factors) {
  VecF acc[kMr][N];
#pragma GCC unroll 4
  for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      acc[r][n] = load(c + r * ldc + n * kLanes);
      if constexpr (!std::is_same_v<Factors, std::nullptr_t>) acc[r][n] *= factors[r];
    }
  }
  accumulate<N, kLayout>(acc, a, lda, b, ldb, k_count);
#pragma GCC unroll 4
  for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + r * ldc + n * kLanes, acc[r][n]);
  }
}

// Calls body(v, n) for groups of n vectors from v on, n a compile-time number from kNr down to 1.
template <class Body>
FASTGPT_INLINE void for_vector_groups(int64_t begin, int64_t end, Body body) {
  int64_t v = begin;
  for (; v + kNr <= end; v += kNr) body(v, std::integral_constant<int, kNr>{});
  if (end - v == 1) body(v, std::integral_constant<int, 1>{});
  if constexpr (kNr > 2)
    if (end - v == 2) body(v, std::integral_constant<int, 2>{});
  if constexpr (kNr > 3)
    if (end - v == 3) body(v, std::integral_constant<int, 3>{});
}

// ---- copies into workspaces, as float32 ----

// Rows of n numbers, each filled up with 0 to n_padded, a multiple of kLanes; then rows of 0 up to rows_padded.
template <class T>
static void pack_rows(float* packed, const T* x, int64_t stride, int64_t rows, int64_t rows_padded, int64_t n,
                      int64_t n_padded, float scale = 1.0f) {
  for (int64_t row = 0; row < rows; ++row) {
    // Rows of one head often lie a page apart, where the processor does not look ahead by itself.
    __builtin_prefetch(x + min(row + 8, rows - 1) * stride);
    float* to = packed + row * n_padded;
    for_lanes(n, [&](int64_t i, int64_t c) { store(to + i, load_lanes(x + row * stride + i, c) * scale); });
  }
  memset(packed + rows * n_padded, 0, sizeof(float) * n_padded * (rows_padded - rows));
}

// The transpose of packed rows: column i of n_padded columns becomes row i, ld numbers long. rows: a multiple of
// kLanes.
static void transpose_rows(float* transposed, int64_t ld, const float* packed, int64_t rows, int64_t n_padded) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t i = 0; i < n_padded; i += kLanes) {
      VecF square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = load(packed + (row + r) * n_padded + i);
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(transposed + (i + r) * ld + row, square[r]);
    }
  }
}

// The inverse of pack_rows, row r times scale[r].
template <class T, class Scale>
static void unpack_rows(T* x, int64_t stride, const float* packed, int64_t rows, int64_t n, int64_t n_padded,
                        Scale scale) {
  for (int64_t row = 0; row < rows; ++row) {
    const float factor = scale(row);
    T* to = x + row * stride;
    for_lanes(n, [&](int64_t i, int64_t c) { store_lanes(to + i, load(packed + row * n_padded + i) * factor, c); });
  }
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
