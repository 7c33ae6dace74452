// Launches of kernels/cuda/attention_backward.cuh by dtype and head_dim.
#include "../kernels/cuda/attention_backward.cuh"
#include "cuda_attention.h"

namespace fastgpt {
namespace cuda {

int attention_backward(HeadsRef dq, HeadsRef dk, HeadsRef dv, float* delta, HeadsRef dout, HeadsRef q, HeadsRef k,
                       HeadsRef v, HeadsRef out, const float* lse, const AttentionCall& call) {
  return with_instance(call, [&](auto t, auto head_dim) -> int {
    using T = decltype(t);
    const BackwardInputs<T> in = {to_heads<const T>(dout), to_heads<const T>(q), to_heads<const T>(k),
                                  to_heads<const T>(v)};
    constexpr int kD = decltype(head_dim)::value;
    const auto backward = call.dropout_threshold ? attention_backward<T, kD, true> : attention_backward<T, kD, false>;
    return backward(to_heads<T>(dq), to_heads<T>(dk), to_heads<T>(dv), delta, in, to_heads<const T>(out), lse,
                    sizes_of(call), dropout_of(call), static_cast<cudaStream_t>(call.stream));
  });
}

}  // namespace cuda
}  // namespace fastgpt
