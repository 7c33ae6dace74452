// Launches of kernels/cuda/attention_hopper.cuh by dtype and head_dim.
#include "../kernels/cuda/attention_hopper.cuh"
#include "cuda_attention.h"
#include "cuda_tensor_map.h"

namespace fastgpt {
namespace cuda {

namespace {

template <class T, int kD, bool kDropout>
int forward(HeadsRef out, float* lse, HeadsRef q, HeadsRef k, HeadsRef v, const AttentionCall& call, int processors) {
  using Tile = HopperTile<kD, kDropout>;
  ForwardMaps maps = {};
  if (const cudaError_t error = heads_map(maps.q, q, call, call.q_len, Tile::kQueries)) return error;
  if (const cudaError_t error = heads_map(maps.k, k, call, call.k_len, Tile::kKeys)) return error;
  if (const cudaError_t error = heads_map(maps.v, v, call, call.k_len, Tile::kKeys)) return error;
  return attention_forward_hopper<T, kD, kDropout>(maps, to_heads<T>(out), lse, sizes_of(call), dropout_of(call),
                                                   processors, static_cast<cudaStream_t>(call.stream));
}

}  // namespace

int attention_forward_hopper(HeadsRef out, float* lse, HeadsRef q, HeadsRef k, HeadsRef v, const AttentionCall& call) {
  if (call.batch == 0 || call.n_heads == 0 || call.q_len == 0) return cudaSuccess;
  const int processors = hopper_processors();
  if (processors == 0) return cudaErrorInvalidValue;
  return with_instance(call, [&](auto t, auto head_dim) -> int {
    using T = decltype(t);
    constexpr int kD = decltype(head_dim)::value;
    const auto launch = call.dropout_threshold ? forward<T, kD, true> : forward<T, kD, false>;
    return launch(out, lse, q, k, v, call, processors);
  });
}

}  // namespace cuda
}  // namespace fastgpt
