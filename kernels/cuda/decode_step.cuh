// One decode step of the whole network, for 1 to many rows of different lengths, as a chain of 5 kernels a layer and 2
// at the end, nothing of which the host must wait for; made to be captured once as a CUDA graph and replayed a token.
//
//   queries, keys, values = norm1(x) W^T + b    keys and values go straight into the cache         decode_linear.cuh
//   attended = attention(queries, cache)        parts of the length; the last block joins them     below
//   x += attended W^T + b                                                                          decode_linear.cuh
//   hidden = gelu(norm2(x) W^T + b)
//   x += hidden W^T + b
//   the likeliest of final_norm(x) W^T + b, block by block
//   token = the likeliest of those; x = its embedding: the next step begins here                   decode_choose.cuh
//
// Everything that changes from step to step is read on the device, so one graph serves all lengths. What the floor is:
// 247 MB of bfloat16 weights a token for GPT-2 124M, 58 us on an H200; 62 launches. No GPU has run this file yet.
#pragma once

#include "decode_attention.cuh"
#include "decode_linear.cuh"

namespace fastgpt {
namespace cuda {

// A block reads at least so many keys.
constexpr int kLeastKeys = 32;

// out: (batch, n_heads, head_dim), as q; partial: (batch * n_heads, splits, 2 + head_dim); arrived: (batch * n_heads),
// 0 before and after. The last block of a head to arrive joins its parts, in order, so timing does not show.
template <class T, int kPacks>
__global__ void __launch_bounds__(kDecodeWarps* kWarp)
    decode_step_attention_kernel(T* out, float* partial, uint32_t* arrived, const T* q, CacheView<T> k, CacheView<T> v,
                                 const int64_t* state, DecodeSizes sizes) {
  let_next_begin();
  wait_for_previous();
  const int64_t head = blockIdx.x / sizes.splits, batch = head / sizes.n_heads, h = head % sizes.n_heads;
  const int split = static_cast<int>(blockIdx.x % sizes.splits);
  const int64_t length = state[batch * kState + kLength];
  int64_t part = (length + sizes.splits - 1) / sizes.splits;
  part = part < kLeastKeys ? kLeastKeys : part;
  const int used = static_cast<int>((length + part - 1) / part);
  if (split >= used) return;
  const int stride = 2 + sizes.head_dim;
  float* parts = partial + head * sizes.splits * stride;
  const int64_t begin = split * part, end = begin + part < length ? begin + part : length;
  attend_part<T, kPacks>(parts + static_cast<int64_t>(split) * stride, reinterpret_cast<float*>(dynamic_shared()),
                         q + head * sizes.head_dim, k.data + batch * k.batch_stride + h * k.head_stride, k.row_stride,
                         v.data + batch * v.batch_stride + h * v.head_stride, v.row_stride, begin, end, sizes);

  uint32_t* last = reinterpret_cast<uint32_t*>(dynamic_shared() +
                                               kDecodeWarps * shared_decode_stride(sizes.head_dim) * sizeof(float));
  // Every thread's part of the sum must be seen before the block counts as arrived.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) store_shared(last, static_cast<uint32_t>(atomicAdd(arrived + head, 1u) + 1 == used));
  __syncthreads();
  if (load_shared(last) == 0) return;
  __threadfence();
  if (threadIdx.x == 0) arrived[head] = 0;
  for (int d = threadIdx.x; d < sizes.head_dim; d += kDecodeWarps * kWarp) {
    float m, l;
    const float acc = join_parts(used, stride, d, m, l, [&](int64_t i) { return load_fresh(parts + i); });
    out[head * sizes.head_dim + d] = from_float<T>(acc / l);
  }
}

template <class T>
cudaError_t decode_step_attention(T* out, float* partial, uint32_t* arrived, const T* q, CacheView<T> k, CacheView<T> v,
                                  const int64_t* state, DecodeSizes sizes, const LinearLaunch& call) {
  const int pieces = (sizes.head_dim + Pack<T>::kSize - 1) / Pack<T>::kSize;
  sizes.lanes = lanes_for(pieces);
  // head_dim is 256 at most: 32 pieces, or 64 of float32.
  constexpr int kMost = sizeof(T) == 4 ? 2 : 1;
  if (pieces > kMost * kWarp) return cudaErrorInvalidValue;
  const auto kernel = pieces > kWarp ? decode_step_attention_kernel<T, kMost> : decode_step_attention_kernel<T, 1>;
  const size_t shared = kDecodeWarps * shared_decode_stride(sizes.head_dim) * sizeof(float) + 16;
  return launch_chained(call.overlap, kernel, static_cast<unsigned>(sizes.batch * sizes.n_heads * sizes.splits),
                        kDecodeWarps * kWarp, shared, call.stream, out, partial, arrived, q, k, v, state, sizes);
}

template <class T>
struct StepLayer {
  RowNorm<T> norm1, norm2;
  Matrix<T> heads, project, widen, narrow;
  CacheView<T> keys, values;
};

// Where a step leaves what the next kernel reads.
template <class T>
struct StepBuffers {
  T *queries, *attended, *hidden;
  float* partial;
  uint32_t* arrived;
  uint64_t* best;
};

// One layer; x: (batch, width) float32.
template <class T>
cudaError_t decode_layer(const StepLayer<T>& layer, float* x, const int64_t* state, const StepBuffers<T>& to,
                         const DecodeSizes& sizes, const LinearLaunch& call) {
  Output<T> out = {};
  out.sink = Sink::kHeads;
  out.narrow = to.queries;
  out.keys = const_cast<T*>(layer.keys.data);
  out.values = const_cast<T*>(layer.values.data);
  out.batch_stride = layer.keys.batch_stride;
  out.head_stride = layer.keys.head_stride;
  out.row_stride = layer.keys.row_stride;
  out.head_dim = sizes.head_dim;
  out.state = state;
  cudaError_t error = decode_linear_for_batch<T, true>(layer.heads, x, layer.norm1, out, call);
  if (error != cudaSuccess) return error;
  error = decode_step_attention(to.attended, to.partial, to.arrived, static_cast<const T*>(to.queries), layer.keys,
                                layer.values, state, sizes, call);
  if (error != cudaSuccess) return error;
  out.sink = Sink::kResidual;
  out.x = x;
  error = decode_linear_for_batch<T, false>(layer.project, to.attended, {}, out, call);
  if (error != cudaSuccess) return error;
  out.sink = Sink::kGelu;
  out.narrow = to.hidden;
  error = decode_linear_for_batch<T, true>(layer.widen, x, layer.norm2, out, call);
  if (error != cudaSuccess) return error;
  out.sink = Sink::kResidual;
  return decode_linear_for_batch<T, false>(layer.narrow, to.hidden, {}, out, call);
}

// The head and the choice of the next tokens.
template <class T>
cudaError_t decode_end(const Matrix<T>& head, RowNorm<T> norm, const StepBuffers<T>& to, float* logits, bool drawn,
                       Choose choose, Embeddings<T> table, const LinearLaunch& call) {
  Output<T> out = {};
  out.sink = Sink::kBest;
  out.state = choose.state;
  out.logits = logits;
  out.best = to.best;
  out.parts = choose.parts = call.most_blocks;
  out.draw = drawn ? choose.draw : nullptr;
  const cudaError_t error = decode_linear_for_batch<T, true>(head, choose.x, norm, out, call);
  if (error != cudaSuccess) return error;
  return launch_chained(call.overlap, decode_choose_kernel<T>, static_cast<unsigned>(call.batch), kChooseThreads,
                        sizeof(ChooseShared), call.stream, choose, table);
}

}  // namespace cuda
}  // namespace fastgpt
