// Products of a few inputs with a float32 matrix as PyTorch keeps it, read once from memory.
//
//   y[m][n] (+)= sum over k of W[n][k] x[m][k] + bias[n],   n = begin .. end - 1
//
// Work: the rows of the range are cut into four parts, and one row of each is read at a time: four streams, far apart,
// which the processor fetches ahead independently of each other. Each row is summed by kLanes accumulators in the order
// of k, then the lanes are added: the same sum whatever the other rows, inputs and threads are, so a row of a batch
// gets the bits that it gets alone. Bytes: W once.
//
// Measured on 2 cores of an AMD EPYC (Zen 3), the matrices of GPT-2 124M, GB/s with 2 threads (1 thread), when a plain
// sum reached 41 (32.5) over four or eight streams and 37 (23) over one:
//   1 row at a time                                  37 (23)
//   4 neighbouring rows                              37 (23), with software prefetch 512 to 2048 bytes ahead 34 (20)
//   2, 4, 6 rows, far apart                          39 (28), 40 (31), 40 (31)
//   4 rows, far apart, prefetch 256 to 1024 ahead    40 (30.5 to 27.5)
//   the same in huge pages                           no difference
// Several inputs, 1 thread, GFLOP/s with 4, 8, 16, 32 inputs (FMA peak 100), matrix in memory:
//   all columns at once, sums in registers           37, 46, 62, 69
//   64, 128, 192, 256 columns at a time              37 38 54 60, 38 46 63 67, 42 52 65 68, 36 45 59 66
//   two rows with 4 to 6 inputs in one pass          32 with 4, 40 instead of 51 with 6: two streams are too few
//   fetching the next rows ahead during the passes   31, 42, 57, 66
#pragma once

#include "decoder_args.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kStreams = 4;
// Inputs at a time: with kStreams rows they fill the registers.
constexpr int kRowInputs = kLanes == 16 ? 6 : 3;
// Of many inputs: columns at a time, whose rows lie in L1, and inputs whose sums do.
constexpr int64_t kRowColumns = 192, kRowBatch = 64;

// Where an output goes: y[m * ld + n], with the bias, onto what is there when `add` is true.
struct Output {
  float* y;
  int64_t ld;
  const float* bias;
  bool add;

  FASTGPT_INLINE void put(const Output& out, int64_t m, int64_t n, float sum) {
    float* place = out.y + m * out.ld + n;
    if (out.bias != nullptr) sum += out.bias[n];
    *place = out.add ? *place + sum : sum;
  }

  // Several outputs side by side.
  static void put_rows(const Output& out, int64_t m, int64_t n, const float* sums, int64_t rows) {
    for_lanes(rows, [&](int64_t i, int64_t c) {
      float* place = out.y + m * out.ld + n + i;
      VecF sum = load_lanes(sums + i, c);
      if (out.bias != nullptr) sum += load_lanes(out.bias + n + i, c);
      store_lanes(place, out.add ? load_lanes(place, c) + sum : sum, c);
    });
  }
};

// acc += R rows, `distance` numbers apart, times M inputs.
template <int R, int M>
FASTGPT_INLINE void multiply_rows(VecF (&acc)[R][M], const float* w, int64_t distance, const float* x, int64_t ldx,
                                  int64_t columns) {
  for_lanes(columns, [&](int64_t k, int64_t lanes) {
    VecF input[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) input[m] = load_lanes(x + m * ldx + k, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const VecF weight = load_lanes(w + r * distance + k, lanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[r][m] += weight * input[m];
    }
  });
}

// What R rows of the matrix are multiplied with, and where to.
struct RowTask {
  const Output& out;
  const float *w, *x;
  int64_t n, row_distance, n_in, ldx;
};

// Few inputs: the sums stay in registers.
template <int R, int M>
static void row_products(const RowTask& t) {
  VecF acc[R][M] = {};
  multiply_rows<R, M>(acc, t.w, t.row_distance * t.n_in, t.x, t.ldx, t.n_in);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) Output::put(t.out, m, t.n + r * t.row_distance, reduce_add(acc[r][m]));
}

// M of many inputs, from column k on: the sums, (count, R) vectors, wait in L1.
template <int R, int M>
static void add_row_products(float* place, const RowTask& t, int64_t m0, int64_t k, int64_t columns) {
  VecF acc[R][M];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) acc[r][m] = load(place + (m * R + r) * kLanes);
  multiply_rows<R, M>(acc, t.w + k, t.row_distance * t.n_in, t.x + m0 * t.ldx + k, t.ldx, columns);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) store(place + (m * R + r) * kLanes, acc[r][m]);
}

// All inputs with R rows. Of many inputs, each group of columns of the rows is multiplied with all while it is in L1.
template <int R>
static void rows_with_all(const RowTask& t, int64_t m0, int64_t count) {
  alignas(64) float sums[R * kRowBatch * kLanes];
  memset(sums, 0, count * R * kLanes * sizeof(float));
  for (int64_t k = 0; k < t.n_in; k += kRowColumns) {
    const int64_t columns = min(kRowColumns, t.n_in - k);
    int64_t m = 0;
    for (; m + kRowInputs <= count; m += kRowInputs)
      add_row_products<R, kRowInputs>(sums + m * R * kLanes, t, m0 + m, k, columns);
    for (; m + 2 <= count; m += 2) add_row_products<R, 2>(sums + m * R * kLanes, t, m0 + m, k, columns);
    if (m < count) add_row_products<R, 1>(sums + m * R * kLanes, t, m0 + m, k, columns);
  }
  for (int64_t m = 0; m < count; ++m)
    for (int r = 0; r < R; ++r)
      Output::put(t.out, m0 + m, t.n + r * t.row_distance, reduce_add(load(sums + (m * R + r) * kLanes)));
}

template <int R>
static void multiply_row_group(const RowTask& t, int64_t count) {
  if (count == 1) return row_products<R, 1>(t);
  if (count == 2) return row_products<R, 2>(t);
  if (count == 3) return row_products<R, 3>(t);
  for (int64_t m = 0; m < count; m += kRowBatch) rows_with_all<R>(t, m, min(kRowBatch, count - m));
}

// Rows begin .. end of the matrix with `count` inputs, (count, n_in), ldx apart.
static void multiply_float_rows(const Output& out, const DecoderMatrix& matrix, const float* x, int64_t ldx,
                                int64_t count, int64_t begin, int64_t end) {
  const float* w = static_cast<const float*>(matrix.data);
  const int64_t n_in = matrix.n_in, part = (end - begin) / kStreams;
  for (int64_t n = begin; n < begin + part; ++n)
    multiply_row_group<kStreams>({out, w + n * n_in, x, n, part, n_in, ldx}, count);
  for (int64_t n = begin + kStreams * part; n < end; ++n)
    multiply_row_group<1>({out, w + n * n_in, x, n, 0, n_in, ldx}, count);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
