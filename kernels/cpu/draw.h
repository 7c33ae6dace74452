// The next token of each row, drawn from its logits: the scheme of kernels/cuda/decode_choose.cuh and
// fastgpt/generation/draws.py.
//
//   token = the first of the largest  logit / temperature + G,   G = -log E,  E = -log(1 - U)
//   U       (word + 1/2) / 2^32, word the first of Philox (key: seed; counter: token, tokens drawn before, row, 1)
//   top_k   logits below the k-th largest are left out, those that tie with it stay
//   top_p   of the others, a logit is left out when the probabilities of all larger ones together reach top_p
//
// The maximum of numbers with Gumbel noise falls on each token with its softmax probability, so nothing is summed over
// the vocabulary; and each token's noise is a function of where it stands, so the draws of a row are the same whatever
// the other rows, the threads and the vectors are. NaN is the largest number of all, as in torch.argmax.
//
// Work: each thread takes a part of the vocabulary of every row. With top_k it keeps its k largest in a heap; one
// thread a row puts the heaps together, then noise is drawn for what reaches the k-th largest, kLanes at a time. With
// top_p one thread a row finds the border: logits so small that all of them could not make up 1 - top_p are out at
// once, and among the others the border is found by halving, each time with the sum of what lies above. Sums are in the
// order of the vocabulary, so that they do not depend on the threads. Bytes: the logits once, twice with top_k, five
// times with top_p.
//
// Measured on one core of an AMD EPYC (Zen 3), ms for one row of 50,257 logits (torch's softmax and multinomial 2):
// top_k 1, 50, 500, 5000: 0.02, 0.04, 0.15, 0.84; without top_k 0.36: Philox for each, whose other three words go
// unused.
// On two cores, one row: top_p 0.9 with logits of standard deviation 4, which leave few tokens, 0.20, with 0.6, which
// leave most, 0.43 (without top_p 0.19); top_k 50 and top_p 0.9 0.09 (without top_p 0.03).
//
// Paper: Gumbel, "Statistical theory of extreme values", 1954.
#pragma once

#include <cmath>
#include <limits>

#include "decoder_args.h"
#include "parallel.h"
#include "philox.h"
#include "simd.h"
#include "simd_int8.h"
#include "team.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// The natural logarithm of normal positive numbers, within 2 ulp: x = m 2^e with m around 1, and a polynomial in m - 1.
FASTGPT_INLINE VecF log(VecF x) {
  const VecI offset = (VecI)bits_of(x) - 0x3f3504f3;  // the bits of the root of 1/2
  const VecI exponent = offset >> 23;
  const VecF f = (VecF)((VecI)bits_of(x) - (VecI)((VecU)exponent << 23)) - 1.0f, e = to_float(exponent), z = f * f;
  VecF p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return f + (p * f * z - e * 2.12194440e-4f - 0.5f * z) + e * 0.693359375f;
}

// G for words of Philox.
FASTGPT_INLINE VecF gumbel(VecU word) {
  // 16 bits at a time, exactly: rounded once, as (float)word is. Vectors have no conversion of unsigned numbers.
  const VecF whole = to_float((VecI)(word >> 16)) * 65536.0f + to_float((VecI)(word & 0xffff));
  const VecF u = (whole + 0.5f) * 2.3283064365386963e-10f;
  // log(1 - u) keeps small u exact, where the winners lie: the rounding of w is in both factors.
  const VecF w = 1.0f - u, lost = 1.0f - w;
  const VecI tiny = lost == 0.0f, all = u >= 1.0f;
  const VecF e = tiny ? u : -log(all ? splat(0.5f) : w) * (u / (tiny ? splat(1.0f) : lost));
  return all ? splat(kNothing) : -log(e);
}

// A number whose order is that of x, NaN last; both zeros are the same. 0 is less than all.
FASTGPT_INLINE uint32_t ordered(float x) {
  if (x != x) return 0xffffffffu;
  x += 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The x of a number from `ordered`.
FASTGPT_INLINE float of_order(uint32_t order) {
  const uint32_t bits = order & 0x80000000u ? order ^ 0x80000000u : ~order;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// The larger key wins: the larger x, and among equals the first index. 0 is less than every key.
FASTGPT_INLINE uint64_t choice_key(float x, uint32_t index) {
  return (static_cast<uint64_t>(ordered(x)) << 32) | (0xffffffffu - index);
}

// Calls body(i) for the numbers that are not below the floor (kAbove: that are above it), or NaN; body may raise the
// floor. Most blocks hold none, which one comparison of vectors tells.
template <bool kAbove, class Body>
FASTGPT_INLINE void for_reaching(const float* x, int64_t begin, int64_t end, const float& floor, Body body) {
  constexpr int64_t kBlock = 8 * kLanes;
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t stop = min(block + kBlock, end);
    VecI reached = {};
    const VecF least = splat(floor);
    int64_t i = block;
    for (; i + kLanes <= stop; i += kLanes) reached |= kAbove ? ~(load(x + i) <= least) : ~(load(x + i) < least);
    bool look = i < stop;
    for (int lane = 0; lane < kLanes; ++lane) look |= reached[lane] != 0;
    if (!look) continue;
    for (i = block; i < stop; ++i)
      if (kAbove ? !(x[i] <= floor) : !(x[i] < floor)) body(i);
  }
}

// The k largest of all that is put into it, the least of them first; 0 where there are fewer. -inf is left out: it is
// never drawn.
struct LargestHeap {
  uint32_t* orders;
  int64_t k;

  void clear() const { memset(orders, 0, k * sizeof(uint32_t)); }

  void put(uint32_t order) const {
    if (order <= orders[0]) return;
    int64_t place = 0;
    for (int64_t child; (child = 2 * place + 1) < k; place = child) {
      child += child + 1 < k && orders[child + 1] < orders[child];
      if (order <= orders[child]) break;
      orders[place] = orders[child];
    }
    orders[place] = order;
  }

  void put_all(const float* x, int64_t begin, int64_t end) const {
    float floor = orders[0] == 0 ? kNothing : of_order(orders[0]);
    for_reaching<true>(x, begin, end, floor, [&](int64_t i) {
      put(ordered(x[i]));
      if (orders[0] != 0) floor = of_order(orders[0]);
    });
  }
};

// The first `count` lanes of x, and nothing in the others.
FASTGPT_INLINE VecF load_or_nothing(const float* p, int64_t count) {
  const VecF x = load_lanes(p, count);
  return count == kLanes ? x : lane_numbers() < static_cast<int32_t>(count) ? x : splat(kNothing);
}

// The sum of term(i, count) over 0 .. n: of blocks in float32, of all in double.
template <class Term>
FASTGPT_INLINE double sum_blocks(int64_t n, Term term) {
  constexpr int64_t kBlock = 64 * kLanes;
  double total = 0.0;
  for (int64_t block = 0; block < n; block += kBlock)
    total += sum_lanes(min(kBlock, n - block), [&](int64_t i, int64_t count) { return term(block + i, count); });
  return total;
}

// What it takes to make up top_p of a row.
struct Nucleus {
  float *logits, *weights;  // (n): room for those that may be needed

  // The order of `ordered` from which on logits are needed; those below `least` are out already.
  uint32_t border(const float* row, int64_t n, uint32_t least, const DrawOptions& options) const {
    VecF most = splat(kNothing);
    VecI nan = {};
    for_lanes(n, [&](int64_t i, int64_t count) {
      const VecF x = load_or_nothing(row + i, count);
      nan |= x != x;
      most = max(most, x);
    });
    const float largest = reduce_max(most);
    bool finite = largest - largest == 0.0f;
    for (int lane = 0; lane < kLanes; ++lane) finite &= nan[lane] == 0;
    // Only the largest can be drawn then, or all are equal.
    if (!finite) return least;
    const auto weight = [&](VecF x) { return exp((x - largest) * options.inverse_temperature); };
    const float floor = least == 0 ? kNothing : of_order(least);
    const double total = sum_blocks(n, [&](int64_t i, int64_t count) {
      const VecF x = load_or_nothing(row + i, count);
      return x >= floor ? weight(x) : VecF{};
    });
    const double enough = options.top_p * total;
    const double small = largest + std::log(0.5 * (total - enough) / n) / options.inverse_temperature;
    const float cut = small > floor ? static_cast<float>(small) : floor;
    int64_t count = 0;
    for_reaching<false>(row, 0, n, cut, [&](int64_t i) { logits[count++] = row[i]; });
    for_lanes(count, [&](int64_t i, int64_t c) { store_lanes(weights + i, weight(load_lanes(logits + i, c)), c); });
    uint32_t low = ordered(cut), high = ordered(largest);
    while (low < high) {
      const uint32_t middle = low + (high - low) / 2;
      const float limit = of_order(middle);
      const double above = sum_blocks(count, [&](int64_t i, int64_t c) {
        return load_or_nothing(logits + i, c) > limit ? load_lanes(weights + i, c) : VecF{};
      });
      above < enough ? high = middle : low = middle + 1;
    }
    return high;
  }
};

// What one row's noise is drawn with, and the best so far in each lane.
struct RowDraw {
  const Dropout& keys;
  float inverse_temperature;
  uint32_t drawn, row;
  VecF values;
  VecU tokens;

  RowDraw(const Dropout& keys, const DrawOptions& options, int64_t row, int64_t first)
      : keys(keys),
        inverse_temperature(options.inverse_temperature),
        drawn(static_cast<uint32_t>(options.drawn)),
        row(static_cast<uint32_t>(row)),
        values(splat(kNothing)),
        tokens(VecU{} + static_cast<uint32_t>(first)) {}

  inline __attribute__((always_inline)) void add(VecF logits, VecU numbers) {
    VecU words[4] = {numbers, VecU{} + drawn, VecU{} + row, VecU{} + 1};
    philox(words, keys.keys);
    const VecF x = logits * inverse_temperature + gumbel(words[0]);
    const VecI better = ~(x <= values) & (values == values);
    values = better ? x : values;
    tokens = better ? numbers : tokens;
  }

  void add_all(const float* logits, int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t i, int64_t count) {
      add(load_or_nothing(logits + begin + i, count), (VecU)lane_numbers() + static_cast<uint32_t>(begin + i));
    });
  }

  // Those from `least` on, in the order of `ordered`.
  void add_reaching(const float* logits, int64_t begin, int64_t end, uint32_t least) {
    float some[kLanes];
    uint32_t numbers[kLanes];
    int count = 0;
    const auto flush = [&] {
      for (; count < kLanes; ++count) some[count] = kNothing, numbers[count] = numbers[0];
      VecU which;
      memcpy(&which, numbers, sizeof which);
      add(load(some), which);
      count = 0;
    };
    const auto take = [&](int64_t i) {
      some[count] = logits[i], numbers[count] = static_cast<uint32_t>(i);
      if (++count == kLanes) flush();
    };
    const float floor = least == 0 ? kNothing : of_order(least);
    least == 0 ? for_reaching<true>(logits, begin, end, floor, take)
               : for_reaching<false>(logits, begin, end, floor, take);
    if (count > 0) flush();
  }

  uint64_t best() const {
    uint64_t most = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t key = choice_key(values[lane], tokens[lane]);
      most = key > most ? key : most;
    }
    return most;
  }
};

// Places in the workspace.
struct DrawBuffers {
  uint64_t* keys;    // (count, threads)
  uint32_t* orders;  // (count, threads, top_k)
  uint32_t* least;   // (count): the order from which on tokens may be drawn
  float* nuclei;     // (threads, 2, n) with top_p
  int64_t bytes = 0;

  DrawBuffers(void* base, int64_t count, int64_t n, const DrawOptions& options, int threads) {
    const auto take = [&](int64_t size, int64_t each) {
      char* place = base == nullptr ? nullptr : static_cast<char*>(base) + bytes;
      bytes += size * each;
      return place;
    };
    keys = reinterpret_cast<uint64_t*>(take(count * threads, sizeof(uint64_t)));
    orders = reinterpret_cast<uint32_t*>(take(count * threads * options.top_k, sizeof(uint32_t)));
    least = reinterpret_cast<uint32_t*>(take(count, sizeof(uint32_t)));
    nuclei = reinterpret_cast<float*>(take(options.top_p < 1.0 ? threads * 2 * n : 0, sizeof(float)));
  }
};

static int64_t draw_bytes(int64_t count, int64_t n, const DrawOptions& options, int threads) {
  return DrawBuffers(nullptr, count, n, options, threads).bytes;
}

// What one thread does. Before the first barrier it reads the logits of its own part only: team.begin(n, kTileRows) and
// on, as the head's products are divided.
static void draw_part(const DrawArgs& a, const Team& team) {
  const DrawBuffers buffers(a.workspace, a.count, a.n, a.options, team.size);
  const Dropout keys(a.options.seed, 0, 0);
  const int64_t begin = team.begin(a.n, kTileRows), end = team.end(a.n, kTileRows), k = a.options.top_k;
  const auto heap = [&](int64_t m, int thread) {
    return LargestHeap{buffers.orders + (m * team.size + thread) * k, k};
  };
  const bool nucleus = a.options.top_p < 1.0, limited = k > 0 || nucleus;
  if (limited) {
    for (int64_t m = 0; m < a.count && k > 0; ++m) {
      heap(m, team.thread).clear();
      heap(m, team.thread).put_all(a.logits + m * a.n, begin, end);
    }
    team.wait();
    float* room = buffers.nuclei + team.thread * 2 * a.n;
    for (int64_t m = team.begin(a.count); m < team.end(a.count); ++m) {
      for (int64_t i = k; i < team.size * k; ++i) heap(m, 0).put(heap(m, 0).orders[i]);
      uint32_t least = k > 0 ? heap(m, 0).orders[0] : 0;
      if (nucleus) least = Nucleus{room, room + a.n}.border(a.logits + m * a.n, a.n, least, a.options);
      buffers.least[m] = least;
    }
    team.wait();
  }
  for (int64_t m = 0; m < a.count; ++m) {
    RowDraw draw(keys, a.options, a.rows[m], begin);
    const float* logits = a.logits + m * a.n;
    limited ? draw.add_reaching(logits, begin, end, buffers.least[m]) : draw.add_all(logits, begin, end);
    buffers.keys[m * team.size + team.thread] = begin < end ? draw.best() : 0;
  }
  team.wait();
  if (team.thread != 0) return;
  for (int64_t m = 0; m < a.count; ++m) {
    uint64_t most = 0;
    for (int thread = 0; thread < team.size; ++thread) {
      const uint64_t key = buffers.keys[m * team.size + thread];
      most = key > most ? key : most;
    }
    a.tokens[m] = 0xffffffffu - static_cast<uint32_t>(most);
  }
}

static void draw_tokens(const DrawArgs& a) {
  run_team(a.num_threads, [&](const Team& team) { draw_part(a, team); });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
