// What forward and backward of attention share: the walk over tiles, scores, the causal mask, workspaces.
#pragma once

#include "parallel.h"
#include "philox.h"
#include "simd.h"
#include "small_gemm.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// A tile: kBlockM queries, a multiple of kNr vectors where that fits, and kBlockN keys, a multiple of Philox's 64.
constexpr int64_t kBlockM = kLanes == 16 ? 64 : kLanes == 8 ? 48 : 32;
constexpr int64_t kBlockN = 64;
constexpr double kLn2 = 0.693147180559945309;

static_assert(kBlockM % kLanes == 0 && kLanes % kMr == 0 && kBlockN % 64 == 0 && kBlockN % kMr == 0, "tails");

// One tile of the scores: rows are queries, row r sees the keys j <= reach + r of the block. With reach = 1:
//
//   row 0   1 1 0 0
//   row 1   1 1 1 0
//   row 2   1 1 1 1
struct Tile {
  int64_t first_key, keys, reach;

  // Keys that a row sees.
  int64_t visible(int64_t row) const { return max(0, min(keys, reach + row + 1)); }
  // Keys for which the vector of rows that begins at row holds a number, be it the 0 of a hidden one.
  int64_t computed(int64_t row) const { return round_up(visible(row + kLanes - 1), kMr); }
  // The first vector of rows in which one sees key j.
  int64_t first_vector(int64_t j) const { return max(0, j - reach) / kLanes; }
};

// A block of queries of one head.
struct QueryBlock {
  int64_t first, rows;
  int64_t diagonal;  // row r sees keys j <= diagonal + r of the head

  QueryBlock(int64_t block, int64_t q_len, int64_t k_len)
      : first(block * kBlockM), rows(min(kBlockM, q_len - first)), diagonal(first + k_len - q_len) {}

  int64_t keys() const { return diagonal + rows; }
  int64_t padded_rows() const { return round_up(rows, kLanes); }
  Tile tile(int64_t first_key) const { return {first_key, min(kBlockN, keys() - first_key), diagonal - first_key}; }
};

// The steps of products of T: pairs where the processor has an instruction for them.
template <class T>
using StepOf = std::conditional_t<std::is_same_v<T, Bf16> && kHasPairs, Pair, float>;

// Where weights are written over scores, row by row: as rows of float32, or of bfloat16 in the first half of each row.
template <class Step>
using Weight = std::conditional_t<kPerStep<Step> == 2, Bf16, float>;

FASTGPT_INLINE VecF make_step(const VecF (&x)[1]) { return x[0]; }
FASTGPT_INLINE VecPairs make_step(const VecF (&x)[2]) { return make_pairs(x[0], x[1]); }

// The padded length in steps of rows whose neighbours make the steps.
template <class Step>
FASTGPT_INLINE int64_t row_steps(int64_t n_padded) {
  return round_up(steps_of<Step>(n_padded), kLanes);
}

// scores[j][row] = scale * (x_j . y_row) for the keys j and rows of a tile, but for those right of the diagonal.
// x: rows of ld steps; y_transposed: (steps, kBlockM).
template <class Step>
static void tile_scores(float* scores, const Tile& tile, int64_t padded_rows, const Step* x, int64_t ld,
                        const Step* y_transposed, int64_t steps, float scale) {
  for (int64_t j = 0; j < tile.keys; j += kMr) {
    for_vector_groups(tile.first_vector(j), padded_rows / kLanes, [&](int64_t v, auto count) {
      product<count, Layout::kRows>(scores + j * kBlockM + v * kLanes, kBlockM, x + j * ld, ld,
                                    y_transposed + v * kLanes, kBlockM, steps, scale);
    });
  }
}

// Sets the scores that the causal mask hides from the vector of rows at row to -infinity.
FASTGPT_INLINE void hide_scores(float* scores, const Tile& tile, int64_t row) {
  for (int64_t j = tile.visible(row); j < tile.computed(row); ++j) {
    const VecI first_row_that_sees = VecI{} + static_cast<int32_t>(j - tile.reach - row);
    float* s = scores + j * kBlockM + row;
    store(s, lane_numbers() >= first_row_that_sees ? load(s) : splat(-__builtin_inff()));
  }
}

// The rows of one head of a (batch, n_heads, len, head_dim) tensor.
template <class T>
FASTGPT_INLINE T* head_rows(const HeadsRef& x, int64_t batch, int64_t head) {
  return static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride;
}

// How a call is cut into items of work: each head into `parts`, part p taking the query blocks p, p + parts, ...
// counted from the last, so that the parts of a head cost about the same.
struct Plan {
  int64_t q_blocks, parts, items, n_padded, k_padded;
  int threads;

  explicit Plan(const AttentionSizes& s, int num_threads) {
    const int64_t heads = s.batch * s.n_heads;
    q_blocks = (s.q_len + kBlockM - 1) / kBlockM;
    n_padded = round_up(s.head_dim, kLanes);
    k_padded = round_up(s.k_len, kMr);
    // In double: the product of the sizes may be beyond 64 bits.
    const double work = static_cast<double>(heads) * s.q_len * s.k_len * s.head_dim;
    threads = threads_for(work < 1e15 ? static_cast<int64_t>(work) : INT64_MAX, 65536, num_threads);
    const bool balanced = heads % threads == 0 || heads >= 8 * threads;
    parts = balanced ? 1 : max(1, min(q_blocks, (4 * threads + heads - 1) / heads));
    items = heads * parts;
  }
};

// Hands out a workspace piece by piece, each on a cache line of its own. Without a base it only counts.
struct Pieces {
  float* base;
  int64_t used = 0;

  template <class Number = float>
  Number* take(int64_t count) {
    static_assert(sizeof(Number) == sizeof(float), "counted as floats");
    Number* piece = base == nullptr ? nullptr : reinterpret_cast<Number*>(base + used);
    used += round_up(count, 16);
    return piece;
  }
};

// Calls kernel(T{}, integral_constant<bool, dropout>{}) as the arguments say.
template <class Args, class Kernel>
FASTGPT_INLINE void with_kernel_types(const Args& a, Kernel kernel) {
  const bool wide = a.dtype == DType::kFloat32;
  if (a.dropout_threshold > 0) {
    wide ? kernel(float{}, std::true_type{}) : kernel(Bf16{}, std::true_type{});
  } else {
    wide ? kernel(float{}, std::false_type{}) : kernel(Bf16{}, std::false_type{});
  }
}

// How much memory that takes: calls size(Step{}) as the dtype says.
template <class Size>
FASTGPT_INLINE int64_t with_step(DType dtype, Size size) {
  return dtype == DType::kFloat32 ? size(StepOf<float>{}) : size(StepOf<Bf16>{});
}

template <class Args>
FASTGPT_INLINE Dropout dropout_of(const Args& a, int64_t head) {
  return Dropout(a.seed, head, a.dropout_threshold);
}

// What kept weights are multiplied by, for the probability that 16 bits can hold.
FASTGPT_INLINE float dropout_scale(int32_t threshold) {
  return threshold == 65536 ? 0.0f : 65536.0f / static_cast<float>(65536 - threshold);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
