// The end of a decode step: each row's next token, on the device, and its embedding, with which the next step begins.
//
// Greedy: the first of the largest logits. Drawn: the first of the largest  logit / temperature + G,  G = -log E,
// E = -log(1 - U), U uniform from Philox: the maximum of logits plus Gumbel noise falls on each token with its softmax
// probability, so no sum over the vocabulary is needed, and the head can compare as it goes. top_k: the k-th largest
// logit is found by its bits, 11 at a time, in a histogram; smaller ones are left out, those that tie with it stay.
//
//   Philox   key: seed; counter: c0 = token, c1 = number of tokens drawn before in this row, c2 = row, c3 = 1
//
// State of a row, four int64: its newest token, its length with it, where the next token goes in `found`, and how many
// tokens were drawn. Paper: Gumbel, "Statistical theory of extreme values", 1954.
#pragma once

#include "mma.cuh"
#include "philox.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kState = 4, kToken = 0, kLength = 1, kPlace = 2, kDrawn = 3;
constexpr int kChooseThreads = 256;
constexpr int kBins = 2048;

// A number whose order is that of x, NaN last as in torch.argmax; both zeros are the same.
__device__ inline uint32_t ordered(float x) {
  if (isnan(x)) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The larger key wins: the larger x, and among equals the first index. 0 is less than every key.
__device__ inline uint64_t choice_key(float x, int index) {
  return (static_cast<uint64_t>(ordered(x)) << 32) | (0xffffffffu - static_cast<uint32_t>(index));
}

struct DrawOptions {
  float inverse_temperature;
  uint32_t key0, key1;
  uint32_t top_k;

  __device__ float perturb(float logit, int token, int64_t row, int64_t drawn) const {
    const uint32_t word =
        philox({key0, key1}, static_cast<uint32_t>(token), static_cast<uint32_t>(drawn), static_cast<uint32_t>(row), 1)
            .values[0];
    // log1p keeps small U exact: there lie the winners. At U = 1 the noise is -inf, and the token never wins.
    const float u = (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f;
    return logit * inverse_temperature - logf(-log1pf(-u));
  }
};

__device__ inline uint64_t most(uint64_t a, uint64_t b) { return a > b ? a : b; }

// The largest key of a block of kThreads, in every thread. shared: 16 bytes a warp.
template <int kThreads = kChooseThreads>
__device__ inline uint64_t block_most(uint64_t key, uint64_t* shared) {
  for (int step = kWarp / 2; step > 0; step /= 2) key = most(key, __shfl_xor_sync(0xffffffffu, key, step));
  if (threadIdx.x % kWarp == 0) store_shared(shared + threadIdx.x / kWarp * 2, key);
  __syncthreads();
  uint64_t largest = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) largest = most(largest, load_shared(shared + i * 2));
  return largest;
}

template <class T>
struct Embeddings {
  const T *tokens, *positions;
  int width;
};

// x = token embedding + position embedding of one row, by the whole block.
template <class T>
__device__ inline void embed(float* x, Embeddings<T> table, int64_t token, int64_t position) {
  const T *a = table.tokens + token * table.width, *b = table.positions + position * table.width;
  for (int i = threadIdx.x; i < table.width; i += blockDim.x) x[i] = to_float(a[i]) + to_float(b[i]);
}

// The first x of a group of steps. x: (batch, width), state: (batch, kState).
template <class T>
__global__ void __launch_bounds__(kChooseThreads)
    decode_embed_kernel(float* x, const int64_t* state, Embeddings<T> table) {
  const int64_t row = blockIdx.x;
  const int64_t* mine = state + row * kState;
  embed(x + row * table.width, table, mine[kToken], mine[kLength] - 1);
}

// The bits of the k-th largest of n numbers, as `ordered` gives them. histogram: kBins numbers; found: 2.
template <int kThreads = kChooseThreads>
__device__ inline uint32_t kth_largest(const float* numbers, int n, uint32_t k, uint32_t* histogram, uint32_t* found) {
  uint32_t prefix = 0, mask = 0;
  const int shifts[3] = {21, 10, 0}, bits[3] = {11, 11, 10};
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) store_shared(histogram + i, 0u);
    __syncthreads();
    const uint32_t ones = (1u << bits[pass]) - 1;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t number = ordered(numbers[i]);
      if ((number & mask) == prefix) atomicAdd(histogram + (number >> shifts[pass] & ones), 1u);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
      // Lane 0 has the bins of the largest numbers.
      const int first = kBins - 1 - static_cast<int>(threadIdx.x) * (kBins / kWarp);
      uint32_t sum = 0;
      for (int i = 0; i < kBins / kWarp; ++i) sum += load_shared(histogram + first - i);
      uint32_t before = sum;
      for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t other = __shfl_sync(0xffffffffu, before, (static_cast<int>(threadIdx.x) - step) & (kWarp - 1));
        if (static_cast<int>(threadIdx.x) >= step) before += other;
      }
      before -= sum;
      if (before < k && k <= before + sum) {
        int bin = first;
        while (before + load_shared(histogram + bin) < k) before += load_shared(histogram + bin--);
        store_shared(found, static_cast<uint32_t>(bin));
        store_shared(found + 1, k - before);
      }
    }
    __syncthreads();
    prefix |= load_shared(found) << shifts[pass];
    mask |= ones << shifts[pass];
    k = load_shared(found + 1);
  }
  return prefix;
}

struct ChooseShared {
  uint32_t histogram[kBins];
  uint64_t keys[kChooseThreads / kWarp * 2];
  uint32_t found[4];
};

struct Choose {
  int64_t* state;        // (batch, kState)
  int64_t* found;        // (batch, group)
  float* x;              // (batch, width)
  const uint64_t* best;  // (batch, parts), of the head; 0 where no block wrote
  const float* logits;   // (batch, n_logits), where top_k is wanted, else null
  const DrawOptions* draw;
  int parts, n_logits, max_len, group;
};

template <class T>
__global__ void __launch_bounds__(kChooseThreads) decode_choose_kernel(Choose choose, Embeddings<T> table) {
  ChooseShared& shared = *reinterpret_cast<ChooseShared*>(dynamic_shared());
  let_next_begin();
  wait_for_previous();
  const int64_t row = blockIdx.x;
  int64_t* state = choose.state + row * kState;
  const int64_t length = state[kLength], place = state[kPlace], drawn = state[kDrawn];
  uint64_t key = 0;
  if (choose.logits == nullptr) {
    for (int i = threadIdx.x; i < choose.parts; i += kChooseThreads)
      key = most(key, choose.best[row * choose.parts + i]);
  } else {
    const float* logits = choose.logits + row * choose.n_logits;
    const DrawOptions draw = *choose.draw;
    const uint32_t least = kth_largest(logits, choose.n_logits, draw.top_k, shared.histogram, shared.found);
    for (int i = threadIdx.x; i < choose.n_logits; i += kChooseThreads)
      if (ordered(logits[i]) >= least) key = most(key, choice_key(draw.perturb(logits[i], i, row, drawn), i));
  }
  key = block_most(key, shared.keys);
  const int64_t token = 0xffffffffu - static_cast<uint32_t>(key);
  // A row at the end of its cache stays there: nobody reads it any more.
  const int64_t longer = length < choose.max_len ? length + 1 : length;
  embed(choose.x + row * table.width, table, token, longer - 1);
  if (threadIdx.x != 0) return;
  if (place < choose.group) choose.found[row * choose.group + place] = token;
  state[kToken] = token;
  state[kLength] = longer;
  state[kPlace] = place + 1;
  state[kDrawn] = drawn + 1;
}

}  // namespace cuda
}  // namespace fastgpt
