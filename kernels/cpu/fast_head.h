// The largest logits of a float32 head, exactly, for a quarter of its bytes: an 8-bit copy of the head tells which rows
// can be among the largest, and only these are multiplied in float32, as the whole head would be.
//
// The copy. Row w of the head becomes s q, where q holds whole numbers from -127 to 127 and s = max |w| / 127; what is
// left is r = w - s q. Input x becomes t p, p whole numbers up to R, with delta = x - t p. R 127 n < 2^31, so that q .
// p is computed in 32-bit integers without an error, in any order.
//
// The bound. With n inputs, u = 2^-24, ||.|| the Euclidean norm:
//
//   w . x - s t (q . p)  =  r . x + s q . delta
//   |r . x|              <= s / 2 sum over O of |x_k|  +  ||r|| ||x outside O||        for any set O of inputs, because
//                           |r_k| <= s / 2 (Hölder), and by Cauchy-Schwarz for the others
//   |s q . delta|        <= ||s q|| ||delta||,   ||s q|| <= ||w|| + ||r||
//   |head - w . x|       <= n u / (1 - n u) ||w|| ||x||     for the float32 sum, in any order, fused or not
//   |screen - s t (q . p)| <= 4 u ||s q|| ||t p||           three roundings of the product
//
// O are the inputs that stand out: leaving x_k to Cauchy-Schwarz costs about ||r|| x_k^2 / (2 ||x||), which is more
// than s / 2 |x_k| where |x_k| > ||x|| sqrt(12 / n), as ||r|| is about s sqrt(n / 12). So |head - screen| <= B with
//
//   B = a1 s + a2 ||r|| + a3 (||w|| + ||r||)
//
// where a1, a2, a3 belong to the input; 16 u more of ||w|| ||x|| cover the roundings of s, ||r||, ||w|| and of B
// itself.
//
// The choice. The k-th largest logit is at least the k-th largest screen - B, so a row whose screen + B is below that
// is not among the k largest; all others are multiplied in float32. What is compared in the end are the numbers of the
// full head, to the bit, so ties and NaN come out the same. Each of these numbers is also held against its bound: one
// outside tells that the weights have changed since they were copied, and the full head is taken.
//
// Work: threads take parts of the rows, four far apart at a time (decoder_rows.h). Bytes: the copy once, n + 12 a row,
// and 4 n for each row that is left.
//
// Measured on 2 cores of an AMD EPYC (Zen 3), GPT-2 124M with random weights, float32, 16 tokens in one call, in turns:
//   full head 108.8 tokens/s, screened 139.9 (1.29 times; the bytes allow 1.31); making the copy 28 ms
//   rows left of 50,257: 1 to 9 for the best, 123 to 195 for the best 50 (with inputs that stand out: 1 to 9, 127 to
//   168)
// Not tried: a screen of 4 bits. Its ||r|| is 18 times as large, so the bound would leave about every row.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "decoder_args.h"
#include "decoder_rows.h"
#include "parallel.h"
#include "simd_pairs.h"
#include "team.h"

namespace fastgpt {
namespace FASTGPT_ISA {

static int64_t screen_stride(int64_t n_in) { return (n_in + kScreenUnit - 1) / kScreenUnit * kScreenUnit; }

// ---- the copy ----

// One row; a row with a number that is no finite float32, or far too small, gets an infinite bound: it is never left
// out.
static void screen_row(int8_t* q, float* stats, const float* w, int64_t n, int64_t stride) {
  typedef int8_t Bytes __attribute__((vector_size(kLanes)));
  const VecI magnitude_bits = VecI{} + 0x7fffffff;
  VecF largest_lanes = {};
  VecI too_large = {};
  for_lanes(n, [&](int64_t k, int64_t count) {
    const VecF size = (VecF)((VecI)load_lanes(w + k, count) & magnitude_bits);
    too_large |= ~(size <= std::numeric_limits<float>::max());
    largest_lanes = max(largest_lanes, size);
  });
  bool finite = true;
  for (int lane = 0; lane < kLanes; ++lane) finite &= too_large[lane] == 0;
  const float largest = reduce_max(largest_lanes), scale = largest / 127.0f;
  memset(q, 0, stride);
  stats[0] = stats[1] = stats[2] = 0.0f;
  if (finite && largest == 0.0f) return;
  if (!finite || largest < 1e-30f) {
    stats[2] = std::numeric_limits<float>::infinity();
    return;
  }
  const float inverse = 1.0f / scale, round_to_int = 12582912.0f;
  VecF rest = {}, size = {};
  for_lanes(n, [&](int64_t k, int64_t count) {
    // What load_lanes adds to a tail are zeros: they change no sum.
    const VecF steps = load_lanes(w + k, count) * inverse;
    const VecF shifted = steps + round_to_int, left = steps - (shifted - round_to_int);
    const VecI whole = (VecI)bits_of(shifted) - (VecI)bits_of(splat(round_to_int));
    const Bytes narrow = __builtin_convertvector(whole, Bytes);
    memcpy(q + k, &narrow, count);
    rest += left * left;
    size += steps * steps;
  });
  const float more = 1.0f + (n + 8) * 1.2e-7f;  // the roundings of the sums
  stats[0] = scale;
  stats[1] = scale * std::sqrt(reduce_add(rest)) * more;
  stats[2] = scale * std::sqrt(reduce_add(size)) * more + stats[1];
}

static void screen_rows(const ScreenRowsArgs& a) {
  const int64_t stride = screen_stride(a.n_in);
  parallel_ranges(a.n_out, threads_for(a.n_out, 64, a.num_threads), [&](int64_t begin, int64_t end, int) {
    for (int64_t row = begin; row < end; ++row)
      screen_row(a.rows + row * stride, a.stats + kScreenStats * row, a.weight + row * a.n_in, a.n_in, stride);
  });
}

// ---- one step ----

// What the bound needs of one input.
struct ScreenInput {
  float scale, a1, a2, a3;
  bool usable;
};

struct ScreenBuffers {
  int16_t* inputs;      // (n_wanted, stride)
  ScreenInput* bounds;  // (n_wanted)
  float* tops;          // (threads, n_wanted, top_k): the largest lower bounds of each thread's rows, falling
  int64_t* bests;       // (n_wanted, threads)
  std::atomic<int64_t>* left;
  std::atomic<int64_t>* stale;
  int64_t floats;

  ScreenBuffers(float* base, int64_t n_in, int64_t n_wanted, int64_t top_k, int threads) {
    int64_t used = 0;
    const auto take = [&](int64_t bytes) {
      float* place = base == nullptr ? nullptr : base + used;
      used += (bytes + 63) / 64 * 16;
      return static_cast<void*>(place);
    };
    inputs = static_cast<int16_t*>(take(n_wanted * screen_stride(n_in) * sizeof(int16_t)));
    bounds = static_cast<ScreenInput*>(take(n_wanted * sizeof(ScreenInput)));
    tops = static_cast<float*>(take(threads * n_wanted * top_k * sizeof(float)));
    bests = static_cast<int64_t*>(take(threads * n_wanted * sizeof(int64_t)));
    left = static_cast<std::atomic<int64_t>*>(take(sizeof(*left)));
    stale = static_cast<std::atomic<int64_t>*>(take(sizeof(*stale)));
    floats = used;
  }
};

static int64_t screen_floats(int64_t n_in, int64_t n_wanted, int64_t top_k, int threads) {
  return ScreenBuffers(nullptr, n_in, n_wanted, top_k, threads).floats;
}

static ScreenInput screen_input(int16_t* p, const float* x, int64_t n, int64_t stride) {
  double largest = 0.0, squares = 0.0;
  bool finite = true;
  for (int64_t k = 0; k < n; ++k) {
    const double size = std::fabs(static_cast<double>(x[k]));
    finite &= size <= std::numeric_limits<float>::max();
    largest = size > largest ? size : largest;
    squares += size * size;
  }
  if (!finite || largest < 1e-30) return {0.0f, 0.0f, 0.0f, 0.0f, false};
  const int64_t room = ((int64_t{1} << 31) - 1) / (127 * n);
  const double steps = static_cast<double>(room < 32767 ? room : 32767);
  const float scale = static_cast<float>(largest / steps);
  const double inverse = 1.0 / scale, round_to_int = 6755399441055744.0;
  double lost = 0.0;
  for (int64_t k = 0; k < n; ++k) {
    double whole = x[k] * inverse + round_to_int;
    whole -= round_to_int;
    whole = whole > steps ? steps : whole < -steps ? -steps : whole;
    p[k] = static_cast<int16_t>(whole);
    const double delta = x[k] - scale * whole;
    lost += delta * delta;
  }
  memset(p + n, 0, (stride - n) * sizeof(int16_t));
  // The set O: what stands out, then what stands out of the rest.
  double outside = squares, apart = 0.0;
  for (int pass = 0; pass < 3; ++pass) {
    const double limit = outside * 12.0 / n;
    outside = apart = 0.0;
    for (int64_t k = 0; k < n; ++k) {
      const double square = static_cast<double>(x[k]) * x[k];
      square > limit ? apart += std::fabs(static_cast<double>(x[k])) : outside += square;
    }
  }
  const double u = 1.0 / (1 << 24), gamma = n * u / (1.0 - n * u), more = 1.0 + 1e-6;
  return {scale, static_cast<float>(0.5 * apart * more), static_cast<float>(std::sqrt(outside) * more),
          static_cast<float>(((gamma + 24.0 * u) * std::sqrt(squares) + std::sqrt(lost)) * more), true};
}

FASTGPT_INLINE float screen_bound(const ScreenInput& input, const float* stats) {
  return input.a1 * stats[0] + input.a2 * stats[1] + input.a3 * stats[2];
}

// Puts a number into a falling list of k.
FASTGPT_INLINE void insert_top(float* top, int64_t k, float x) {
  if (!(x > top[k - 1])) return;
  int64_t i = k - 1;
  for (; i > 0 && x > top[i - 1]; --i) top[i] = top[i - 1];
  top[i] = x;
}

// What one thread does.
struct ScreenThread {
  const DecoderStepArgs& a;
  const HeadScreen& screen;
  const DecoderMatrix& head;
  const float* x;  // (n_wanted, n_in)
  const ScreenBuffers& buffers;
  const Team& team;

  float* row_of(int64_t m) const { return a.logits + m * head.n_out; }
  float* tops_of(int thread, int64_t m) const { return buffers.tops + (thread * a.n_wanted + m) * screen.top_k; }

  void prepare() const {
    const int64_t stride = screen_stride(head.n_in);
    for (int64_t m = team.begin(a.n_wanted); m < team.end(a.n_wanted); ++m)
      buffers.bounds[m] = screen_input(buffers.inputs + m * stride, x + m * head.n_in, head.n_in, stride);
    for (int64_t i = 0; i < a.n_wanted * screen.top_k; ++i)
      tops_of(team.thread, 0)[i] = -std::numeric_limits<float>::infinity();
    if (team.thread == 0) *buffers.left = 0, *buffers.stale = 0;
    team.wait();
  }

  bool usable() const {
    for (int64_t m = 0; m < a.n_wanted; ++m)
      if (!buffers.bounds[m].usable) return false;
    return true;
  }

  // Screens R rows, `distance` apart, with M inputs.
  template <int R, int M>
  void screen_block(int64_t m0, int64_t row, int64_t distance) const {
    const int64_t stride = screen_stride(head.n_in);
    const int8_t* q = screen.rows + row * stride;
    const int16_t* p = buffers.inputs + m0 * stride;
    VecI sums[R][M] = {};
    for (int64_t k = 0; k < stride; k += kPairStep)
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m)
          sums[r][m] = add_pair_products(sums[r][m], q + r * distance * stride + k, p + m * stride + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const int64_t n = row + r * distance;
        const float* stats = screen.stats + kScreenStats * n;
        const ScreenInput& input = buffers.bounds[m0 + m];
        const float value = input.scale * stats[0] * static_cast<float>(reduce_add(sums[r][m]));
        row_of(m0 + m)[n] = value;
        insert_top(tops_of(team.thread, m0 + m), screen.top_k, value - screen_bound(input, stats));
      }
  }

  template <int R>
  void screen_all(int64_t row, int64_t distance) const {
    int64_t m = 0;
    for (; m + 2 <= a.n_wanted; m += 2) screen_block<R, 2>(m, row, distance);
    if (m < a.n_wanted) screen_block<R, 1>(m, row, distance);
  }

  // At least as small as the k-th largest logit. It may be taken over each thread's rows alone.
  float floor_of(int64_t m) const {
    float floor = -std::numeric_limits<float>::infinity();
    for (int thread = 0; thread < team.size; ++thread) {
      const float kth = tops_of(thread, m)[screen.top_k - 1];
      floor = kth > floor ? kth : floor;
    }
    return floor;
  }

  // Calls body(row, bound) for the rows of begin .. end that may be among the largest. A NaN is never below.
  template <class Body>
  void for_left(int64_t m, int64_t begin, int64_t end, Body body) const {
    const float floor = floor_of(m);
    const ScreenInput& input = buffers.bounds[m];
    const float* values = row_of(m);
    for (int64_t n = begin; n < end; ++n) {
      const float bound = screen_bound(input, screen.stats + kScreenStats * n);
      if (!(values[n] + bound < floor)) body(n, bound);
    }
  }

  void count_left(int64_t begin, int64_t end) const {
    int64_t count = 0;
    for (int64_t m = 0; m < a.n_wanted; ++m) for_left(m, begin, end, [&](int64_t, float) { ++count; });
    buffers.left->fetch_add(count, std::memory_order_relaxed);
    team.wait();
  }

  // The float32 logits of the rows that are left; -inf for the others. Then the best of them.
  void multiply_left(int64_t begin, int64_t end) const {
    const float* w = static_cast<const float*>(head.data);
    bool stale = false;
    for (int64_t m = 0; m < a.n_wanted; ++m) {
      const Output out = {a.logits + m * head.n_out, head.n_out, head.bias, false};
      int64_t best = -1, done = begin;
      float* values = row_of(m);
      for_left(m, begin, end, [&](int64_t n, float bound) {
        const float screened = values[n];
        row_products<1, 1>({out, w + n * head.n_in, x + m * head.n_in, n, 0, head.n_in, head.n_in});
        stale |= std::fabs(values[n] - screened) > bound;
        if (best < 0 || values[n] > values[best] || (values[n] != values[n] && values[best] == values[best])) best = n;
        if (screen.fill) hide(values, done, n);
        done = n + 1;
      });
      if (screen.fill) hide(values, done, end);
      buffers.bests[m * team.size + team.thread] = best;
    }
    if (stale) *buffers.stale = 1;
    team.wait();
  }

  static void hide(float* values, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) values[n] = -std::numeric_limits<float>::infinity();
  }

  void choose() const {
    for (int64_t m = 0; m < a.n_wanted; ++m) {
      const float* values = row_of(m);
      int64_t best = -1;
      for (int thread = 0; thread < team.size; ++thread) {
        const int64_t n = buffers.bests[m * team.size + thread];
        const bool first = n >= 0 && best < 0;
        if (first || (n >= 0 && (values[n] > values[best] || (values[n] != values[n] && values[best] == values[best]))))
          best = n;
      }
      a.best[m] = best;
    }
  }

  bool run() const {
    prepare();
    if (!usable()) return false;
    const int64_t begin = team.begin(head.n_out, kTileRows), end = team.end(head.n_out, kTileRows);
    const int64_t part = (end - begin) / kStreams;
    for (int64_t n = begin; n < begin + part; ++n) screen_all<kStreams>(n, part);
    for (int64_t n = begin + kStreams * part; n < end; ++n) screen_all<1>(n, 0);
    team.wait();
    count_left(begin, end);
    const int64_t left = *buffers.left;
    if (team.thread == 0) screen.outcome[0] = left;
    // So many rows, here and there, cost as much as the whole head.
    if (left > a.n_wanted * head.n_out / 4) return false;
    multiply_left(begin, end);
    const bool stale = *buffers.stale != 0;
    if (team.thread == 0) screen.outcome[1] = stale;
    if (stale) return false;
    if (team.thread == 0 && a.best != nullptr) choose();
    return true;
  }
};

// Fills a.best, and a.logits when the screen says so; x are the inputs of the head, one for each wanted entry. Called
// by every thread of the team. False: nothing is done, the full head is needed.
static bool screened_head(const DecoderStepArgs& a, const float* x, const Team& team) {
  const DecoderMatrix& head = a.model->head;
  const HeadScreen& screen = *a.screen;
  const ScreenBuffers buffers(screen.workspace, head.n_in, a.n_wanted, screen.top_k, team.size);
  return ScreenThread{a, screen, head, x, buffers, team}.run();
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
