// Products of large matrices: C = A B + bias, or C += A B + bias, for a linear layer's output and both gradients.
//
//   forward   out (rows, n_out)  = x Wᵀ     A = x                         B = W read by columns
//   dx        (rows, n_in)       = dout W   A = dout                      B = W
//   dW        (n_out, n_in)      = doutᵀ x  A = dout read by columns      B = x        row_sums = dbias
//
// Any strides are taken, as both operands are copied ("packed") on the way. In a step B[pc .. pc + kc, jc .. jc + nc]
// is packed by all threads together into panels of kGemmCols columns; then each thread takes its part of C's rows (of
// its columns too, where there are few rows), packs kMc rows of A at a time into panels of kGemmRows rows, and
// multiplies panel by panel in registers:
//
//        B panels (L3)  | 0 | 1 | 2 |          for each kMc rows of A:       packed into L2
//   A panels   0 ------ | . | . | . |            for each panel of B:        read from L3 once, then from L1 or L2
//   (L2)       1 ------ | . | . | . |              for each panel of A:      one tile of C, kc steps of FMAs
//
// The steps alternate between two buffers for B, so that one barrier a step is enough.
//
// A tile is 6 x 2 vectors with AVX2: 8 loads for 12 FMAs, 15 of 16 registers; with AVX-512 14 x 2, 31 of 32 registers.
// Sums are float32 whatever the operands are. NaN and infinity go through as in the formula.
// Paper: Van Zee, van de Geijn, "BLIS: A Framework for Rapidly Instantiating BLAS Functionality", 2015.
//
// Tried (Zen 3 at 3.24 GHz, one thread, whose peak is 103.6 GFLOP/s; 1024 x 768 x 3072, forward / dx / dW; MKL 93.5 /
// 95.5 / 91.7): the tile alone, panels in L1 or L2, 102. kc = 256, kMc = 192: 94.2 / 94.0 / 94.6; kc = 384: 93.8 / 93.5
// / 95.2; kc = 512: 94.6 / 94.1 / 94.2; kc = 768, kMc = 96: 95.7 / 94.3 / 95.0, and C is then written only once where
// n_in is 768. Asking for the next panel of B while this one is multiplied: 93.2 -> 95.4, 93.4 -> 95.0, 93.6 -> 94.2
// (MKL 93.2 / 94.8 / 91.4 in that run); into L1 instead: 94.4 / 94.1 / 93.8; kNc = 3072, twice the memory: 95.9 / 94.8
// / 94.4. Tiles of 4 x 3 and 3 x 4 vectors run as fast as 6 x 2, 2 x 6 a fifth slower. Packing takes 4 % of the time;
// it runs at 0.8 to 1.3 cycles a number from memory, memcpy at 0.7.
#pragma once

#include "parallel.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

constexpr int kGemmRows = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;
constexpr int kGemmVectors = 2;
constexpr int kGemmCols = kGemmVectors * kLanes;
constexpr int64_t kKc = 768, kNc = 1536;
constexpr int64_t kMcPanels = 96 / kGemmRows;
// Floats of the next panel of B that a step asks for, so that the tiles of one panel ask for all of the next: 1 with
// AVX2; 6 with AVX-512, whose panels are twice as wide and whose blocks of A are fewer panels.
constexpr int64_t kAhead = (kGemmCols + kMcPanels - 1) / kMcPanels;
// With bfloat16 results, sums of unfinished rows wait in the workspace: rows of a pass over B.
constexpr int64_t kPassRows = 2048;

FASTGPT_INLINE int64_t ceil_div(int64_t n, int64_t parts) { return (n + parts - 1) / parts; }

// ---- one tile ----

struct GemmTile {
  float* c;
  int64_t c_stride;
  const float* bias;  // of these columns, or null
  bool add;           // to what c holds
  int64_t rows, cols;
};

// ahead: what is to be asked for of the next panel of B, kAhead floats a step: the tiles of one panel together bring
// the next one into L2.
static void __attribute__((noinline)) multiply_panels(const GemmTile& t, const float* a, const float* b,
                                                      const float* ahead, int64_t k_count) {
  VecF acc[kGemmRows][kGemmVectors] = {};
#pragma GCC unroll 16
  for (int r = 0; r < kGemmRows; ++r) __builtin_prefetch(t.c + r * t.c_stride + kGemmCols - 1, 1);
  // At least one step: with a loop that may be empty, GCC 12 moves every accumulator through memory before and after.
  do {
    VecF row[kGemmVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kGemmVectors; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kGemmRows; ++r) {
      const VecF factor = splat(a[r]);
#pragma GCC unroll 4
      for (int n = 0; n < kGemmVectors; ++n) acc[r][n] += factor * row[n];
    }
    a += kGemmRows;
    b += kGemmCols;
    __builtin_prefetch(ahead, 0, 2);
    ahead += kAhead;
  } while (--k_count > 0);

  if (t.rows == kGemmRows && t.cols == kGemmCols) {
#pragma GCC unroll 16
    for (int r = 0; r < kGemmRows; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < kGemmVectors; ++n) {
        float* c = t.c + r * t.c_stride + n * kLanes;
        if (t.add) acc[r][n] += load(c);
        if (t.bias) acc[r][n] += load(t.bias + n * kLanes);
        store(c, acc[r][n]);
      }
    }
    return;
  }
  float whole[kGemmRows * kGemmCols];
#pragma GCC unroll 16
  for (int r = 0; r < kGemmRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kGemmVectors; ++n) store(whole + r * kGemmCols + n * kLanes, acc[r][n]);
  }
  for (int64_t r = 0; r < t.rows; ++r) {
    for_lanes(t.cols, [&](int64_t i, int64_t count) {
      VecF sum = load_lanes(whole + r * kGemmCols + i, count);
      if (t.add) sum += load_lanes(t.c + r * t.c_stride + i, count);
      if (t.bias) sum += load_lanes(t.bias + i, count);
      store_lanes(t.c + r * t.c_stride + i, sum, count);
    });
  }
}

// ---- packing ----

// Lines are the rows of A or the columns of B; number i of a line lies at x + line * line_stride + i * step_stride.
// A panel is kWidth lines side by side, packed[i * kWidth + line], filled up with lines of 0.
template <int kWidth, class T>
static void pack_any(float* packed, const T* x, int64_t line_stride, int64_t step_stride, int64_t lines, int64_t k) {
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t line = 0; line < kWidth; ++line) {
      T one[kLanes] = {};
      if (line < lines) one[0] = x[line * line_stride + i * step_stride];
      packed[i * kWidth + line] = load(one)[0];
    }
  }
}

// One whole panel of lines that are contiguous, square by square. A store may reach kLanes beyond the panel.
template <int kWidth, class T>
static void pack_transposed(float* packed, const T* x, int64_t line_stride, int64_t k) {
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
#pragma GCC unroll 4
    for (int part = 0; part < kWidth; part += kLanes) {
      VecF square[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) square[r] = part + r < kWidth ? load(x + (part + r) * line_stride + i) : VecF{};
      transpose(square);
#pragma GCC unroll 16
      for (int r = 0; r < kLanes; ++r) store(packed + (i + r) * kWidth + part, square[r]);
    }
  }
  pack_any<kWidth>(packed + i * kWidth, x + i, line_stride, 1, kWidth, k - i);
}

// Panels side by side whose lines lie next to one another: of each step one run of count * kWidth numbers is read, as
// a page holds few steps, and reading panel after panel would open each page anew.
template <int kWidth, class T>
static void pack_side_by_side(float* packed, const T* x, int64_t step_stride, int64_t count, int64_t k) {
  for (int64_t i = 0; i < k; ++i) {
    const T* from = x + i * step_stride;
    for (int64_t panel = 0; panel < count; ++panel, from += kWidth) {
      __builtin_prefetch(from + 8 * step_stride);
      float* to = packed + (panel * k + i) * kWidth;
#pragma GCC unroll 4
      for (int part = 0; part < kWidth; part += kLanes) {
        const VecF lines = load(from + part);
        // The last step's store must not reach into the next panel, which is already there.
        part + kLanes <= kWidth || i + 1 < k ? store(to + part, lines) : store_first(to + part, lines, kWidth - part);
      }
    }
  }
}

// Panels begin .. end - 1 of `lines` lines, panel p at packed + p * kWidth * k, in rising order.
template <int kWidth, class T>
static void pack_panels(float* packed, const T* x, int64_t line_stride, int64_t step_stride, int64_t lines,
                        int64_t begin, int64_t end, int64_t k) {
  constexpr int64_t kGroup = 64 / kWidth;
  for (int64_t p = begin; p < end;) {
    float* to = packed + p * kWidth * k;
    const T* from = x + p * kWidth * line_stride;
    const int64_t group = min(kGroup, end - p);
    if (line_stride == 1 && lines - (p + group - 1) * kWidth >= max(kWidth, kLanes)) {
      pack_side_by_side<kWidth>(to, from, step_stride, group, k);
      p += group;
      continue;
    }
    if (step_stride == 1 && lines - p * kWidth >= kWidth)
      pack_transposed<kWidth>(to, from, line_stride, k);
    else
      pack_any<kWidth>(to, from, line_stride, step_stride, lines - p * kWidth, k);
    ++p;
  }
}

template <int kWidth>
static void pack(float* packed, const void* x, DType dtype, int64_t offset, int64_t line_stride, int64_t step_stride,
                 int64_t lines, int64_t begin, int64_t end, int64_t k) {
  if (dtype == DType::kFloat32)
    pack_panels<kWidth>(packed, static_cast<const float*>(x) + offset, line_stride, step_stride, lines, begin, end, k);
  else
    pack_panels<kWidth>(packed, static_cast<const Bf16*>(x) + offset, line_stride, step_stride, lines, begin, end, k);
}

// sums[line] (+)= the sum of the panel's line. Sums of 32 steps are added up, which halves the digits that are lost.
static void add_lines(float* sums, bool add, const float* panel, int64_t lines, int64_t k) {
  VecF total = {};
  for (int64_t i = 0; i < k; i += 32) {
    VecF part = {};
    for (int64_t j = i; j < min(i + 32, k); ++j) part += load(panel + j * kGemmRows);
    total += part;
  }
  float all[kLanes];
  store(all, total);
  for (int64_t line = 0; line < min(lines, kGemmRows); ++line) sums[line] = (add ? sums[line] : 0.0f) + all[line];
}

// ---- the whole product ----

struct GemmPlan {
  int64_t m_panels, kc, nc;  // kc: steps of k; nc: columns of B, a multiple of kGemmCols
  int64_t pass_panels;       // panels of rows in one pass over B
  int64_t a_floats, b_floats, sum_floats;
  bool direct;  // tiles are written where they belong, not into the workspace
};

static GemmPlan plan_gemm(const GemmArgs& g) {
  GemmPlan p;
  p.m_panels = ceil_div(g.m, kGemmRows);
  // Equal parts, so that no step is much smaller than the others.
  p.kc = ceil_div(g.k, ceil_div(g.k, kKc));
  p.nc = ceil_div(ceil_div(g.n, ceil_div(g.n, kNc)), kGemmCols) * kGemmCols;
  p.direct = g.c_dtype == DType::kFloat32;
  p.pass_panels = p.direct ? p.m_panels : min(p.m_panels, kPassRows / kGemmRows);
  // A block of A, and room for one tile and for what a store or load reaches beyond.
  p.a_floats = ceil_div(kMcPanels * kGemmRows * p.kc + kGemmRows * kGemmCols + 2 * kLanes, 16) * 16;
  p.b_floats = p.kc * p.nc;
  p.sum_floats = p.direct || p.kc >= g.k ? 0 : p.pass_panels * kGemmRows * p.nc;
  return p;
}

static int64_t gemm_floats(const GemmArgs& g) {
  if (g.m == 0 || g.n == 0 || g.k == 0) return 0;
  const GemmPlan p = plan_gemm(g);
  return p.a_floats * g.num_threads + 2 * p.b_floats + p.sum_floats;
}

// A tile of float32 sums into bfloat16.
static void round_tile(Bf16* c, int64_t c_stride, bool add, const float* sums, int64_t sums_stride, int64_t rows,
                       int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    for_lanes(cols, [&](int64_t i, int64_t count) {
      Bf16* to = c + r * c_stride + i;
      const VecF sum = load_lanes(sums + r * sums_stride + i, count);
      store_lanes(to, add ? sum + load_lanes(to, count) : sum, count);
    });
  }
}

// One step of one thread: rows begin .. end - 1 (in panels) times the packed columns first .. last - 1 (in panels).
struct GemmStep {
  int64_t pc, kc, jc, nc;    // the part of B
  int64_t pass, begin, end;  // the first panel of this pass, and the thread's
  int64_t first, last;       // the thread's panels of B
  const float* b;
  float *a, *sums;
  bool sums_rows;
};

static void gemm_tiles(const GemmArgs& g, const GemmPlan& p, const GemmStep& s, int64_t begin, int64_t end) {
  const bool is_last = s.pc + s.kc >= g.k;
  float* own_tile = s.a + kMcPanels * kGemmRows * p.kc + kLanes;
  for (int64_t j = s.first; j < s.last; ++j) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i * kGemmRows, col = s.jc + j * kGemmCols;
      GemmTile t = {nullptr,
                    g.c_stride,
                    is_last && g.bias ? g.bias + col : nullptr,
                    s.pc > 0,
                    min(kGemmRows, g.m - row),
                    min(kGemmCols, s.jc + s.nc - col)};
      const float* a = s.a + (i - begin) * kGemmRows * s.kc;
      const float* b = s.b + j * kGemmCols * s.kc;
      const float* ahead = b + (kGemmCols + (i - begin) * kAhead) * s.kc;
      if (p.direct) {
        t.c = static_cast<float*>(g.c) + row * g.c_stride + col;
        t.add = t.add || g.accumulate;
        multiply_panels(t, a, b, ahead, s.kc);
        continue;
      }
      t.c = p.sum_floats ? s.sums + (i - s.pass) * kGemmRows * p.nc + j * kGemmCols : own_tile;
      t.c_stride = p.sum_floats ? p.nc : kGemmCols;
      multiply_panels(t, a, b, ahead, s.kc);
      if (is_last)
        round_tile(static_cast<Bf16*>(g.c) + row * g.c_stride + col, g.c_stride, g.accumulate, t.c, t.c_stride, t.rows,
                   t.cols);
    }
  }
}

static void gemm_rows(const GemmArgs& g, const GemmPlan& p, const GemmStep& s) {
  const int64_t blocks = ceil_div(s.end - s.begin, kMcPanels);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = s.begin + (s.end - s.begin) * block / blocks;
    const int64_t end = s.begin + (s.end - s.begin) * (block + 1) / blocks;
    const int64_t row = begin * kGemmRows;
    pack<kGemmRows>(s.a, g.a.data, g.a.dtype, row * g.a.row_stride + s.pc * g.a.column_stride, g.a.row_stride,
                    g.a.column_stride, g.m - row, 0, end - begin, s.kc);
    if (s.sums_rows) {
      for (int64_t i = begin; i < end; ++i)
        add_lines(g.row_sums + i * kGemmRows, s.pc > 0, s.a + (i - begin) * kGemmRows * s.kc, g.m - i * kGemmRows,
                  s.kc);
    }
    gemm_tiles(g, p, s, begin, end);
  }
}

static void gemm_thread(const GemmArgs& g, const GemmPlan& p, int64_t thread, int64_t team) {
  // Rows are shared out first, as a thread packs its own; columns too where a thread would have under 8 panels of rows.
  int64_t row_parts = team;
  while (row_parts > 1 && (team % row_parts != 0 || p.pass_panels < 8 * row_parts)) --row_parts;
  const int64_t col_parts = team / row_parts, row_part = thread / col_parts, col_part = thread % col_parts;
  float* shared = g.workspace + p.a_floats * g.num_threads;
  int64_t step = 0;
  GemmStep s;
  s.a = g.workspace + p.a_floats * thread;
  s.sums = shared + 2 * p.b_floats;
  for (s.pass = 0; s.pass < p.m_panels; s.pass += p.pass_panels) {
    const int64_t panels = min(p.pass_panels, p.m_panels - s.pass);
    s.begin = s.pass + panels * row_part / row_parts;
    s.end = s.pass + panels * (row_part + 1) / row_parts;
    for (s.jc = 0; s.jc < g.n; s.jc += p.nc) {
      s.nc = min(p.nc, g.n - s.jc);
      const int64_t columns = ceil_div(s.nc, kGemmCols);
      s.first = columns * col_part / col_parts;
      s.last = columns * (col_part + 1) / col_parts;
      s.sums_rows = g.row_sums && s.jc == 0 && col_part == 0;
      for (s.pc = 0; s.pc < g.k; s.pc += p.kc, ++step) {
        s.kc = min(p.kc, g.k - s.pc);
        float* b = shared + (step & 1) * p.b_floats;
        s.b = b;
        pack<kGemmCols>(b, g.b.data, g.b.dtype, s.pc * g.b.row_stride + s.jc * g.b.column_stride, g.b.column_stride,
                        g.b.row_stride, s.nc, columns * thread / team, columns * (thread + 1) / team, s.kc);
        if (team > 1) {
#pragma omp barrier
        }
        gemm_rows(g, p, s);
      }
    }
  }
}

// C without a product: k is 0.
static void gemm_of_nothing(const GemmArgs& g) {
  for (int64_t row = 0; row < g.m; ++row) {
    if (g.row_sums) g.row_sums[row] = 0.0f;
    for_lanes(g.n, [&](int64_t i, int64_t count) {
      const VecF bias = g.bias ? load_lanes(g.bias + i, count) : VecF{};
      const auto put = [&](auto* c) { store_lanes(c, g.accumulate ? bias + load_lanes(c, count) : bias, count); };
      const int64_t at = row * g.c_stride + i;
      g.c_dtype == DType::kFloat32 ? put(static_cast<float*>(g.c) + at) : put(static_cast<Bf16*>(g.c) + at);
    });
  }
}

static void gemm(const GemmArgs& g) {
  if (g.m == 0 || g.n == 0) return;
  if (g.k == 0) return gemm_of_nothing(g);
  const GemmPlan p = plan_gemm(g);
  // 2^20 multiplications take some 20 microseconds, twenty times what starting the other threads takes.
  const int threads = threads_for(ceil_div(g.m * g.n, 1024) * g.k, 1024, g.num_threads);
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    gemm_thread(g, p, omp_get_thread_num(), omp_get_num_threads());
    return;
  }
#endif
  gemm_thread(g, p, 0, 1);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
