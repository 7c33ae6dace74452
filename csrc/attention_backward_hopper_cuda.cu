// Launches of kernels/cuda/attention_backward_hopper.cuh by dtype and head_dim.
#include "../kernels/cuda/attention_backward_hopper.cuh"
#include "cuda_attention.h"
#include "cuda_tensor_map.h"

namespace fastgpt {
namespace cuda {
namespace {

struct Arguments {
  HeadsRef dq, dk, dv, dout, q, k, v, out;
  const float* lse;
  float* statistics;
  int processors;
};

template <class T, int kD, bool kDropout>
int backward(const Arguments& a, const AttentionCall& call) {
  const auto stream = static_cast<cudaStream_t>(call.stream);
  TensorMap q = {}, dout = {}, k = {}, v = {};
  if (const cudaError_t error = heads_map(q, a.q, call, call.q_len, kGradientRows)) return error;
  if (const cudaError_t error = heads_map(dout, a.dout, call, call.q_len, kGradientRows)) return error;
  if (const cudaError_t error = heads_map(k, a.k, call, call.k_len, kGradientRows)) return error;
  if (const cudaError_t error = heads_map(v, a.v, call, call.k_len, kGradientRows)) return error;
  GradientCall<T> gradients = {
      to_heads<T>(a.dq), {}, to_heads<const T>(a.dout), to_heads<const T>(a.out), a.lse, a.statistics, sizes_of(call)};
  if (const cudaError_t error = attention_backward_hopper<T, kD, false, kDropout>(
          {{q, dout}, {k, v}}, gradients, dropout_of(call), a.processors, stream))
    return error;
  gradients.first = to_heads<T>(a.dk);
  gradients.second = to_heads<T>(a.dv);
  return attention_backward_hopper<T, kD, true, kDropout>({{k, v}, {q, dout}}, gradients, dropout_of(call),
                                                          a.processors, stream);
}

}  // namespace

int attention_backward_hopper(HeadsRef dq, HeadsRef dk, HeadsRef dv, float* delta, HeadsRef dout, HeadsRef q,
                              HeadsRef k, HeadsRef v, HeadsRef out, const float* lse, const AttentionCall& call) {
  if (call.batch == 0 || call.n_heads == 0 || call.k_len == 0) return cudaSuccess;
  // No map tells of no queries, but the gradients of keys are zeros then.
  if (call.q_len == 0) return attention_backward(dq, dk, dv, delta, dout, q, k, v, out, lse, call);
  const int processors = hopper_processors();
  if (processors == 0) return cudaErrorInvalidValue;
  return with_instance(call, [&](auto t, auto head_dim) -> int {
    using T = decltype(t);
    constexpr int kD = decltype(head_dim)::value;
    const auto launch = call.dropout_threshold ? backward<T, kD, true> : backward<T, kD, false>;
    return launch({dq, dk, dv, dout, q, k, v, out, lse, delta, processors}, call);
  });
}

}  // namespace cuda
}  // namespace fastgpt
