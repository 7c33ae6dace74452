// Cross-entropy of rows of logits, and its gradient written over them.
//
//   loss = logsumexp(x) - x[target],   x' = (e^(x - logsumexp(x)) - [column = target]) / count
//
// Work: a block a row, 16 bytes a thread and turn; each thread keeps the largest logit m and the sum of e^(x - m) of
// its columns in one pass, the block joins them, a second pass writes the gradient. Bytes: 3 a byte of logits, the
// second read from the second cache, 1 without the gradient. A row whose target is ignored has loss 0 and gradient 0;
// one whose target is outside the vocabulary has loss NaN, and nothing outside is read. float32 sums. Paper: Milakov,
// Gimelshein, "Online normalizer calculation for softmax", 2018.
#pragma once

#include "rows.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kLossThreads = 512;

template <class T>
struct CrossEntropy {
  float* losses;           // (rows,)
  T* logits;               // (rows, padded): vocab_size numbers a row, then columns that are read by nobody
  const int64_t* targets;  // (rows,)
  const int64_t* count;    // one number: rows that are not ignored
  int64_t rows, ignore_index;
  int vocab_size, padded;
  bool gradient;
};

template <class T>
__device__ inline float loss_exp(float x) {
  return sizeof(T) == 4 ? expf(x) : __expf(x);
}

template <class T>
__global__ void __launch_bounds__(kLossThreads) cross_entropy_kernel(CrossEntropy<T> a) {
  Pack<float>* shared = reinterpret_cast<Pack<float>*>(dynamic_shared());  // one a warp
  const int64_t row = blockIdx.x, target = a.targets[row];
  T* logits = a.logits + row * a.padded;
  const bool ignored = target == a.ignore_index, known = target >= 0 && target < a.vocab_size;
  float m = -INFINITY, sum = 0.0f;
  for (int column = static_cast<int>(threadIdx.x) * kGroup; column < a.vocab_size; column += kLossThreads * kGroup) {
    float x[kGroup];
    load_group(x, logits + column);
    float largest = m;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (column + j >= a.vocab_size) x[j] = -INFINITY;
      largest = fmaxf(largest, x[j]);
    }
    // All of them are -inf so far: nothing to add, unless one is NaN.
    const float shift = largest == -INFINITY ? 0.0f : largest;
    sum *= m == -INFINITY ? 1.0f : loss_exp<T>(m - shift);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum += loss_exp<T>(x[j] - shift);
    m = largest;
  }
  const auto join = [&](float other_m, float other_sum) {
    const float largest = fmaxf(m, other_m), shift = largest == -INFINITY ? 0.0f : largest;
    sum = sum * (m == -INFINITY ? 1.0f : loss_exp<T>(m - shift)) +
          other_sum * (other_m == -INFINITY ? 1.0f : loss_exp<T>(other_m - shift));
    m = largest;
  };
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float other_m = __shfl_xor_sync(0xffffffffu, m, step), other_sum = __shfl_xor_sync(0xffffffffu, sum, step);
    join(other_m, other_sum);
  }
  if (threadIdx.x % kWarp == 0) store_shared(shared + threadIdx.x / kWarp, Pack<float>{{m, sum, 0.0f, 0.0f}});
  // Before the gradient is written over it.
  const float wanted = !ignored && known ? to_float(logits[target]) : 0.0f;
  __syncthreads();
  m = -INFINITY;
  sum = 0.0f;
  for (int i = 0; i < kLossThreads / kWarp; ++i) {
    const Pack<float> part = load_shared(shared + i);
    join(part.values[0], part.values[1]);
  }
  const float lse = m + logf(sum);
  if (threadIdx.x == 0) a.losses[row] = ignored ? 0.0f : known ? lse - wanted : NAN;
  if (!a.gradient) return;
  const float factor = 1.0f / static_cast<float>(*a.count);
  for (int column = static_cast<int>(threadIdx.x) * kGroup; column < a.padded; column += kLossThreads * kGroup) {
    float x[kGroup];
    load_group(x, logits + column);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const float p = loss_exp<T>(x[j] - lse) - (column + j == target ? 1.0f : 0.0f);
      x[j] = ignored || column + j >= a.vocab_size ? 0.0f : p * factor;
    }
    store_group(logits + column, x);
  }
}

template <class T>
cudaError_t cross_entropy(const CrossEntropy<T>& a, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  return launch(cross_entropy_kernel<T>, static_cast<unsigned>(a.rows), kLossThreads,
                kLossThreads / kWarp * sizeof(Pack<float>), stream, a);
}

}  // namespace cuda
}  // namespace fastgpt
