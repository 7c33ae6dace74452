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
#pragma once

#include "decoder_args.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kStreams = 4;
// Inputs at a time: with kStreams rows they fill the registers.
constexpr int kRowInputs = kLanes == 16 ? 6 : 3;

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
};

// R rows, `distance` numbers apart, times M inputs. ahead: how far the rows are fetched ahead, 0 for not at all.
template <int R, int M>
FASTGPT_INLINE void multiply_rows(VecF (&acc)[R][M], const float* w, int64_t distance, const float* x, int64_t ldx,
                                  int64_t n_in, int64_t ahead) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[r][m] = VecF{};
  for_lanes(n_in, [&](int64_t k, int64_t lanes) {
    VecF input[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) input[m] = load_lanes(x + m * ldx + k, lanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (ahead != 0) __builtin_prefetch(w + r * distance + k + ahead, 0, 2);
      const VecF weight = load_lanes(w + r * distance + k, lanes);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[r][m] += weight * input[m];
    }
  });
}

template <int R, int M>
static void row_sums(const Output& out, int64_t m0, int64_t n, int64_t row_distance, const float* w, const float* x,
                     int64_t ldx, int64_t n_in, int64_t ahead) {
  VecF acc[R][M];
  multiply_rows<R, M>(acc, w, row_distance * n_in, x, ldx, n_in, ahead);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) Output::put(out, m0 + m, n + r * row_distance, reduce_add(acc[r][m]));
}

// All inputs with R rows, which the first group of inputs brings into the cache for the others.
template <int R>
static void rows_with_all(const Output& out, int64_t n, int64_t row_distance, const float* w, const float* x,
                          int64_t ldx, int64_t count, int64_t n_in) {
  int64_t m = 0;
  // While the later groups compute, the next rows come: each stream goes on where it is.
  const int64_t next = count > kRowInputs ? n_in : 0;
  for (; m + kRowInputs <= count; m += kRowInputs)
    row_sums<R, kRowInputs>(out, m, n, row_distance, w, x + m * ldx, ldx, n_in, m == 0 ? 0 : next);
  for (; m + 2 <= count; m += 2) row_sums<R, 2>(out, m, n, row_distance, w, x + m * ldx, ldx, n_in, next);
  for (; m < count; ++m) row_sums<R, 1>(out, m, n, row_distance, w, x + m * ldx, ldx, n_in, next);
}

// Rows begin .. end of the matrix with `count` inputs, (count, n_in), ldx apart.
static void multiply_float_rows(const Output& out, const DecoderMatrix& matrix, const float* x, int64_t ldx,
                                int64_t count, int64_t begin, int64_t end) {
  const float* w = static_cast<const float*>(matrix.data);
  const int64_t n_in = matrix.n_in, part = (end - begin) / kStreams;
  for (int64_t n = begin; n < begin + part; ++n)
    rows_with_all<kStreams>(out, n, part, w + n * n_in, x, ldx, count, n_in);
  for (int64_t n = begin + kStreams * part; n < end; ++n)
    rows_with_all<1>(out, n, 0, w + n * n_in, x, ldx, count, n_in);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
