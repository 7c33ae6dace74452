// Cross-entropy of rows of logits, and its gradient written over them: the middle of linear_cross_entropy.
//
//   loss = log(sum of e^(z_j)) - z_target,   dz_j = (e^(z_j) / sum - [j == target]) * scale;  both 0 in an ignored row
//
// Work: rows over threads. A row of 50,257 logits (201 kB) lies in L2. First pass, by blocks of about a thousand
// columns that lie in L1: the largest logit so far, the sum of e^(z - largest), and that exponential stored over z.
// Second pass: every block times e^(its largest - the row's) * scale / sum. So e^z is computed once an element; in
// bfloat16, which would round it twice, it is computed anew. Sums: float32 within a block, float64 over the blocks.
#pragma once

#include <cmath>

#include "parallel.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kMaxCrossEntropyBlocks = 256;

// The largest of n numbers and `least`, by lanes.
template <class T>
FASTGPT_INLINE VecF largest_lanes(const T* z, int64_t n, float least) {
  VecF a = splat(least), b = a;
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    a = max(a, load(z + i));
    b = max(b, load(z + i + kLanes));
  }
  for (; i < n; i += kLanes) {
    const int64_t count = min(static_cast<int64_t>(kLanes), n - i);
    // The lanes past the end load as 0, which might be the largest.
    a = max(a, lane_numbers() < static_cast<int32_t>(count) ? load_lanes(z + i, count) : a);
  }
  return max(a, b);
}

template <class T, bool kGradient>
static float cross_entropy_row(T* logits, int64_t vocab_size, int64_t target, float scale) {
  // Above every -inf, so that z - largest is never -inf - -inf.
  float largest = -3.4028234e38f;
  const int64_t shortest = (vocab_size + kMaxCrossEntropyBlocks - 1) / kMaxCrossEntropyBlocks;
  const int64_t length = max(static_cast<int64_t>(1024), (shortest + kLanes - 1) / kLanes * kLanes);
  float largest_then[kMaxCrossEntropyBlocks];
  double sum = 0.0;
  const float picked = load_first(logits + target, 1)[0];
  for (int64_t begin = 0, block = 0; begin < vocab_size; begin += length, ++block) {
    const int64_t n = min(length, vocab_size - begin);
    T* z = logits + begin;
    const VecF high = largest_lanes(z, n, largest);
    const float before = largest;
    largest = reduce_max(high);
    largest_then[block] = largest;
    const float part = sum_lanes(n, [&](int64_t i, int64_t c) {
      const VecF e = exp(load_lanes(z + i, c) - largest);
      if constexpr (kGradient && sizeof(T) == sizeof(float)) store_lanes(z + i, e, c);
      return e;
    });
    if (largest != before) sum *= std::exp(static_cast<double>(before) - largest);
    sum += part;
  }
  if constexpr (kGradient) {
    const float factor = static_cast<float>(scale / sum);
    for (int64_t begin = 0, block = 0; begin < vocab_size; begin += length, ++block) {
      const float block_factor = std::exp(largest_then[block] - largest) * factor;
      T* z = logits + begin;
      for_lanes(min(length, vocab_size - begin), [&](int64_t i, int64_t c) {
        const VecF v = load_lanes(z + i, c);
        const VecF d = sizeof(T) == sizeof(float) ? v * block_factor : exp(v - largest) * factor;
        store_lanes(z + i, d, c);
      });
    }
    const float p = static_cast<float>(std::exp(static_cast<double>(picked) - largest) / sum);
    store_first(logits + target, splat((p - 1.0f) * scale), 1);
  }
  return static_cast<float>(std::log(sum) + (static_cast<double>(largest) - picked));
}

template <class T>
static void cross_entropy_kernel(const CrossEntropyArgs& a) {
  parallel_ranges(a.rows, threads_for(a.rows * a.vocab_size, 8192, a.num_threads),
                  [&](int64_t begin, int64_t end, int) {
                    for (int64_t row = begin; row < end; ++row) {
                      T* logits = static_cast<T*>(a.logits) + row * a.vocab_size;
                      const int64_t target = a.targets[row];
                      if (target == a.ignore_index) {
                        a.losses[row] = 0.0f;
                        if (a.gradient) memset(static_cast<void*>(logits), 0, sizeof(T) * a.vocab_size);
                      } else if (a.gradient) {
                        a.losses[row] = cross_entropy_row<T, true>(logits, a.vocab_size, target, a.scale);
                      } else {
                        a.losses[row] = cross_entropy_row<T, false>(logits, a.vocab_size, target, a.scale);
                      }
                    }
                  });
}

static void cross_entropy(const CrossEntropyArgs& a) {
  a.dtype == DType::kFloat32 ? cross_entropy_kernel<float>(a) : cross_entropy_kernel<Bf16>(a);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
