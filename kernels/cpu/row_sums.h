// Sums over the rows of a tensor, formed while a kernel walks over them: the gradients of weights and biases.
//
// Every thread sums its own rows, in blocks of 64 rows that are then added up (one sum over thousands of rows would
// lose four times as many digits as PyTorch's), and the threads are added in their order, so a run with the same number
// of threads gives the same bits.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int64_t kRowsPerSum = 64;

// sums += block, block = 0
static void add_block(float* sums, float* block, int64_t n) {
  for_lanes(n, [&](int64_t i, int64_t c) {
    store_lanes(sums + i, load_lanes(sums + i, c) + load_lanes(block + i, c), c);
    store_lanes(block + i, VecF{}, c);
  });
}

// Calls body(row, sums, thread), which adds `width` numbers of its row to sums. partial: (threads, 2, width).
template <class Body>
static void for_rows_with_sums(int64_t rows, int64_t width, int threads, float* partial, Body body) {
  memset(partial, 0, sizeof(float) * 2 * width * threads);
  parallel_ranges(rows, threads, [&](int64_t begin, int64_t end, int thread) {
    float *sums = partial + 2 * width * thread, *block = sums + width;
    for (int64_t row = begin; row < end; ++row) {
      body(row, block, thread);
      if ((row - begin) % kRowsPerSum == kRowsPerSum - 1 || row + 1 == end) add_block(sums, block, width);
    }
  });
}

// out = numbers first .. first + n - 1 of the sums of all threads.
template <class W>
static void add_threads(W* out, const float* partial, int64_t width, int threads, int64_t first, int64_t n) {
  for_lanes(n, [&](int64_t i, int64_t c) {
    VecF sum = {};
    for (int thread = 0; thread < threads; ++thread) sum += load_lanes(partial + 2 * width * thread + first + i, c);
    store_lanes(out + i, sum, c);
  });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
