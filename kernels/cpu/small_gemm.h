// Products of small matrices that lie in cache: kMr rows of A times kNr vectors of B, accumulated in registers.
//
//   C[r][n] (+)= sum over k of A[r][k] * B[k][n],   n = 0 .. N * kLanes - 1
//
// A step of k loads N vectors of a row of B, broadcasts kMr numbers of A and does kMr * N FMAs: with AVX2 7 loads for
// 12 FMAs, which keep both units busy for 6 cycles. A is read as it lies, row by row or column by column, B in rows of
// vectors. 4 rows divide every block, so that only the vectors have a tail, and only at head dimensions and diagonals.
//
// A step takes one k of float32 or, where A and B hold pairs of bfloat16, two of them: Pair (k, k + 1) of a row of A,
// and of B the pairs that its rows k and k + 1 make column by column. Sums and C are float32.
#pragma once

#include <type_traits>

#include "simd_bf16.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kMr = 4;
// 32 registers with AVX-512, 16 below; the baseline needs one more for every product, as it has no FMA.
constexpr int kNr = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;

FASTGPT_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

enum class Layout { kRows, kColumns };  // of A: step k of row r is a[r * lda + k] or a[k * lda + r]

// How many k a step takes, and how many steps n of them are.
template <class Step>
constexpr int kPerStep = std::is_same_v<Step, Pair> ? 2 : 1;
template <class Step>
FASTGPT_INLINE int64_t steps_of(int64_t n) {
  return (n + kPerStep<Step> - 1) / kPerStep<Step>;
}

FASTGPT_INLINE VecF add_products(VecF sum, VecF a, VecF b) { return sum + a * b; }

template <int N, Layout kLayout, class Step>
FASTGPT_INLINE void accumulate(VecF (&acc)[kMr][N], const Step* a, int64_t lda, const Step* b, int64_t ldb,
                               int64_t steps) {
  // At least one step: with a loop that may be empty, GCC 12 moves every accumulator through memory before and after.
  int64_t k = 0;
  do {
    decltype(load(b)) row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < kMr; ++r) {
      const auto factor = splat(kLayout == Layout::kRows ? a[r * lda] : a[r]);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = add_products(acc[r][n], factor, row[n]);
    }
    a += kLayout == Layout::kRows ? 1 : lda;
    b += ldb;
  } while (++k < steps);
}

// C = scale * A B
template <int N, Layout kLayout, class Step>
static void product(float* c, int64_t ldc, const Step* a, int64_t lda, const Step* b, int64_t ldb, int64_t steps,
                    float scale) {
  VecF acc[kMr][N] = {};
  accumulate<N, kLayout>(acc, a, lda, b, ldb, steps);
#pragma GCC unroll 4
  for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) store(c + r * ldc + n * kLanes, acc[r][n] * scale);
  }
}

// C += A B, or C = factors * C + A B with one factor a row when factors is given.
template <int N, Layout kLayout, class Step, class Factors>
static void add_product(float* c, int64_t ldc, const Step* a, int64_t lda, const Step* b, int64_t ldb, int64_t steps,
                        Factors factors) {
  VecF acc[kMr][N];
#pragma GCC unroll 4
  for (int r = 0; r < kMr; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      acc[r][n] = load(c + r * ldc + n * kLanes);
      if constexpr (!std::is_same_v<Factors, std::nullptr_t>) acc[r][n] *= factors[r];
    }
  }
  accumulate<N, kLayout>(acc, a, lda, b, ldb, steps);
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

// ---- copies into workspaces ----

// Rows of one head often lie a page apart, where the processor does not look ahead by itself.
template <class T>
FASTGPT_INLINE void prefetch_row(const T* x, int64_t stride, int64_t row, int64_t rows) {
  __builtin_prefetch(x + min(row + 8, rows - 1) * stride);
}

// Rows of n numbers, each filled up with 0 to ld, a multiple of kLanes; then rows of 0 up to rows_padded. As float32
// or, where neighbours of a row make the steps of a product, as they lie.
template <class T>
static void pack_rows(float* packed, const T* x, int64_t stride, int64_t rows, int64_t rows_padded, int64_t n,
                      int64_t ld) {
  for (int64_t row = 0; row < rows; ++row) {
    prefetch_row(x, stride, row, rows);
    for_lanes(n, [&](int64_t i, int64_t c) { store(packed + row * ld + i, load_lanes(x + row * stride + i, c)); });
  }
  memset(packed + rows * ld, 0, sizeof(float) * ld * (rows_padded - rows));
}

static void pack_rows(Pair* packed, const Bf16* x, int64_t stride, int64_t rows, int64_t rows_padded, int64_t n,
                      int64_t ld) {
  for (int64_t row = 0; row < rows; ++row) {
    prefetch_row(x, stride, row, rows);
    Bf16* to = reinterpret_cast<Bf16*>(packed + row * ld);
    memcpy(to, x + row * stride, sizeof(Bf16) * n);
    memset(to + n, 0, sizeof(Bf16) * (2 * ld - n));
  }
  memset(packed + rows * ld, 0, sizeof(Pair) * ld * (rows_padded - rows));
}

// The same where it is rows that make the steps: of pairs rows 2 i and 2 i + 1 become row i. rows_padded: even.
template <class T>
static void pack_row_steps(float* packed, const T* x, int64_t stride, int64_t rows, int64_t rows_padded, int64_t n,
                           int64_t ld) {
  pack_rows(packed, x, stride, rows, rows_padded, n, ld);
}

static void pack_row_steps(Pair* packed, const Bf16* x, int64_t stride, int64_t rows, int64_t rows_padded, int64_t n,
                           int64_t ld) {
  for (int64_t row = 0; row < rows; row += 2) {
    prefetch_row(x, stride, row, rows);
    prefetch_row(x, stride, row + 1, rows);
    const Bf16* first = x + row * stride;
    for_lanes(n, [&](int64_t i, int64_t c) {
      const VecF second = row + 1 < rows ? load_lanes(first + stride + i, c) : VecF{};
      store(packed + row / 2 * ld + i, bits_of(load_lanes(first + i, c)) >> 16 | bits_of(second));
    });
  }
  memset(packed + steps_of<Pair>(rows) * ld, 0, sizeof(Pair) * ld * (rows_padded / 2 - steps_of<Pair>(rows)));
}

// The transpose of packed rows: column i of ld columns becomes row i, ld_transposed steps long. rows: a multiple of
// kLanes.
template <class Step>
static void transpose_rows(Step* transposed, int64_t ld_transposed, const Step* packed, int64_t rows, int64_t ld) {
  for (int64_t row = 0; row < rows; row += kLanes) {
    for (int64_t i = 0; i < ld; i += kLanes) {
      VecF square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = (VecF)load(packed + (row + r) * ld + i);
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) {
        store(transposed + (i + r) * ld_transposed + row, (decltype(load(packed)))square[r]);
      }
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
