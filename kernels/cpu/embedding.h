// Token and position embedding with dropout.
//
//   forward    out[b, t] = (weight[ids[b, t]] + position[t]) * mask * scale
//   backward   dweight[v] = sum over (b, t) with ids[b, t] = v of dout[b, t] * mask * scale,  dposition[t] = sum over b
//
// Work: forward splits the rows of out over threads, backward those of the gradients: every row of dweight is written
// once, by the sum of its tokens or by zeros, so nothing is cleared first and no two threads meet. The tokens of an id
// are a chain (first, next) in rising order; they are summed as row_sums.h does, in float32, 64 to a block. The mask is
// drawn by Philox in both directions. Bytes: forward one write and at most two reads of out, backward two reads of
// dout and one write of dweight and of dposition.
//
// Tried (two Zen 3 cores, forward and backward of 4 x 256 tokens, 50257 x 768 float32, memory kept by the allocator;
// PyTorch 6.7 to 7.2 ms): zeros by memset 7.1 ms, streamed past the caches 3.1 ms, 46 GB/s of writes. Where dweight
// lies on fresh pages, page faults take ten times as long as all else: 58 ms by memset, 67 ms streamed, PyTorch 57
// to 61.
#pragma once

#include "parallel.h"
#include "philox.h"
#include "row_sums.h"
#include "simd.h"
#include "table.h"

namespace fastgpt {
namespace FASTGPT_ISA {

template <class T>
static void embedding_forward_kernel(const EmbeddingForwardArgs& a) {
  const int64_t n = a.n;
  const RowDropout dropout(a.seed, a.dropout_threshold);
  const int64_t rows = a.batch * a.n_tokens;
  parallel_ranges(rows, threads_for(rows * n, 16384, a.num_threads), [&](int64_t begin, int64_t end, int thread) {
    float* factors = a.workspace + thread * RowDropout::padded(n);
    for (int64_t row = begin; row < end; ++row) {
      const T* token = static_cast<const T*>(a.weight) + a.ids[row] * n;
      const T* position = static_cast<const T*>(a.position) + row % a.n_tokens * n;
      T* out = static_cast<T*>(a.out) + row * n;
      if (a.dropout_threshold == 0) {
        for_lanes(n, [&](int64_t i, int64_t c) {
          store_lanes(out + i, load_lanes(token + i, c) + load_lanes(position + i, c), c);
        });
      } else {
        dropout.factors(factors, row, n);
        for_lanes(n, [&](int64_t i, int64_t c) {
          const VecF sum = load_lanes(token + i, c) + load_lanes(position + i, c);
          store_lanes(out + i, sum * load_lanes(factors + i, c), c);
        });
      }
    }
  });
}

// From this size on no cache keeps the gradient of the vocabulary until it is read: its zeros go past the caches.
constexpr int64_t kStreamedBytes = int64_t{32} << 20;

// Sums rows of dout, masked, into one row of a gradient: add(row) for each, then write(out).
template <class T>
struct EmbeddingSum {
  const EmbeddingBackwardArgs& a;
  const RowDropout& dropout;
  float *sums, *block, *factors;
  int64_t count = 0;

  EmbeddingSum(const EmbeddingBackwardArgs& a, const RowDropout& dropout, int thread)
      : a(a), dropout(dropout), sums(a.workspace + thread * embedding_floats(a.n)) {
    block = sums + a.n;
    factors = block + a.n;
    memset(sums, 0, sizeof(float) * 2 * a.n);
  }

  static int64_t embedding_floats(int64_t n) { return 2 * n + RowDropout::padded(n); }

  void add(int64_t row) {
    const T* dout = static_cast<const T*>(a.dout) + row * a.n;
    if (a.dropout_threshold == 0) {
      for_lanes(a.n, [&](int64_t i, int64_t c) {
        store_lanes(block + i, load_lanes(block + i, c) + load_lanes(dout + i, c), c);
      });
    } else {
      dropout.factors(factors, row, a.n);
      for_lanes(a.n, [&](int64_t i, int64_t c) {
        const VecF kept = load_lanes(dout + i, c) * load_lanes(factors + i, c);
        store_lanes(block + i, load_lanes(block + i, c) + kept, c);
      });
    }
    if (++count % kRowsPerSum == 0) add_block(sums, block, a.n);
  }

  void write(T* out) {
    add_block(sums, block, a.n);
    for_lanes(a.n, [&](int64_t i, int64_t c) {
      store_lanes(out + i, load_lanes(sums + i, c), c);
      store_lanes(sums + i, VecF{}, c);
    });
    count = 0;
  }
};

template <class T>
static void embedding_backward_kernel(const EmbeddingBackwardArgs& a) {
  const int64_t n = a.n;
  const RowDropout dropout(a.seed, a.dropout_threshold);
  const int threads = threads_for((a.vocab_size + a.batch * a.n_tokens) * n, 16384, a.num_threads);
  const bool beyond_cache = static_cast<int64_t>(sizeof(T)) * n * a.vocab_size >= kStreamedBytes;
  parallel_ranges(a.vocab_size, threads, [&](int64_t begin, int64_t end, int thread) {
    EmbeddingSum<T> sum(a, dropout, thread);
    for (int64_t id = begin; id < end; ++id) {
      T* out = static_cast<T*>(a.dweight) + id * n;
      if (a.first[id] < 0) {
        const int64_t unused = id;
        while (id + 1 < end && a.first[id + 1] < 0) ++id;
        const int64_t bytes = static_cast<int64_t>(sizeof(T)) * n * (id + 1 - unused);
        beyond_cache ? stream_zeros(out, bytes) : static_cast<void>(memset(out, 0, bytes));
        continue;
      }
      for (int64_t row = a.first[id]; row >= 0; row = a.next[row]) sum.add(row);
      sum.write(out);
    }
  });
  parallel_ranges(a.context_length, threads, [&](int64_t begin, int64_t end, int thread) {
    EmbeddingSum<T> sum(a, dropout, thread);
    for (int64_t t = begin; t < end; ++t) {
      T* out = static_cast<T*>(a.dposition) + t * n;
      if (t >= a.n_tokens) {
        memset(out, 0, sizeof(T) * n);
        continue;
      }
      for (int64_t b = 0; b < a.batch; ++b) sum.add(b * a.n_tokens + t);
      sum.write(out);
    }
  });
}

// Floats of workspace that a thread needs, in either direction.
static int64_t embedding_floats(int64_t n) { return EmbeddingSum<float>::embedding_floats(n); }

static void embedding_forward(const EmbeddingForwardArgs& a) {
  a.dtype == DType::kFloat32 ? embedding_forward_kernel<float>(a) : embedding_forward_kernel<Bf16>(a);
}

static void embedding_backward(const EmbeddingBackwardArgs& a) {
  a.dtype == DType::kFloat32 ? embedding_backward_kernel<float>(a) : embedding_backward_kernel<Bf16>(a);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
