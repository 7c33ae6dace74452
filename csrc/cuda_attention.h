// What both launch files of attention need: arguments as the kernels take them, and the choice of an instance.
#pragma once

#include "../kernels/cuda/attention_tile.cuh"
#include "cuda_launch.h"

namespace fastgpt {
namespace cuda {

template <class T>
Heads<T> to_heads(const HeadsRef& x) {
  return {static_cast<T*>(x.data), x.batch_stride, x.head_stride, x.row_stride};
}

inline AttentionSizes sizes_of(const AttentionCall& call) {
  return {call.batch,
          call.n_heads,
          static_cast<int>(call.q_len),
          static_cast<int>(call.k_len),
          static_cast<int>(call.head_dim),
          call.softmax_scale};
}

inline Dropout dropout_of(const AttentionCall& call) { return {call.seed, call.dropout_threshold}; }

// Calls launch(T{}, head_dim of the tile) with the element type of this call.
template <class Launch>
int with_instance(const AttentionCall& call, Launch launch) {
  const bool narrow = call.head_dim <= 64;
  switch (call.dtype) {
    case DType::kBFloat16:
      return narrow ? launch(__nv_bfloat16{}, Integer<64>{}) : launch(__nv_bfloat16{}, Integer<128>{});
    case DType::kFloat16: return narrow ? launch(__half{}, Integer<64>{}) : launch(__half{}, Integer<128>{});
    case DType::kFloat32: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastgpt
