// Launches of kernels/cuda/attention.cuh by dtype and head_dim.
#include "../kernels/cuda/attention.cuh"
#include "cuda_attention.h"

namespace fastgpt {
namespace cuda {

int attention_forward(HeadsRef out, float* lse, HeadsRef q, HeadsRef k, HeadsRef v, const AttentionCall& call) {
  return with_instance(call, [&](auto t, auto head_dim) -> int {
    using T = decltype(t);
    constexpr int kD = decltype(head_dim)::value;
    const auto forward = call.dropout_threshold ? attention_forward<T, kD, true> : attention_forward<T, kD, false>;
    return forward(to_heads<T>(out), lse, to_heads<const T>(q), to_heads<const T>(k), to_heads<const T>(v),
                   sizes_of(call), dropout_of(call), static_cast<cudaStream_t>(call.stream));
  });
}

}  // namespace cuda
}  // namespace fastgpt
