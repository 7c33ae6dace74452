// How a persistent decoder (decode_persistent.cuh) is launched: blocks of a cooperative launch, depth of the ring.
#pragma once

#include "decode_persistent.cuh"

namespace fastgpt {
namespace cuda {

// How a launch is made: a block a multiprocessor, and the depth of the ring. blocks 0: the chip has no such launches;
// stages 0: shared memory is too small.
struct StreamPlan {
  int blocks, stages;
};

// Calls use(kernel) with the kernel of this depth. float32, which is there to prove the chain, has the shallow ring.
template <class T, class Use>
cudaError_t with_stream_kernel(int stages, Use use) {
  constexpr int kMost = sizeof(T) == 4 ? 2 : 1;
  if constexpr (sizeof(T) == 2) {
    if (stages == 6) return use(decode_persistent_kernel<T, 6, kMost>);
    if (stages == 4) return use(decode_persistent_kernel<T, 4, kMost>);
  }
  if (stages != 2) return cudaErrorInvalidValue;
  return use(decode_persistent_kernel<T, 2, kMost>);
}

template <class T>
int64_t stream_shared(const StreamCall<T>& call, StreamPlan plan) {
  return StreamLayout::of(call, plan.blocks).bytes + static_cast<int64_t>(plan.stages) * kStageBytes;
}

// The deepest ring with which a block fits.
template <class T>
cudaError_t plan_persistent(const StreamCall<T>& call, int64_t most_shared, StreamPlan* plan) {
  *plan = {0, 0};
  cudaError_t error = cooperative_multiprocessors(&plan->blocks);
  if (error != cudaSuccess || plan->blocks == 0) return error;
  for (int stages : {6, 4, 2}) {
    const int64_t shared = stream_shared(call, {plan->blocks, stages});
    if ((stages > 2 && sizeof(T) == 4) || shared > most_shared) continue;
    int resident = 0;
    error = with_stream_kernel<T>(stages, [&](auto kernel) {
      return resident_blocks(kernel, kStreamThreads, static_cast<size_t>(shared), &resident);
    });
    if (error != cudaSuccess) return error;
    if (resident == 0) continue;
    plan->stages = stages;
    return cudaSuccess;
  }
  return cudaSuccess;
}

template <class T>
cudaError_t decode_persistent(const StreamCall<T>& call, StreamPlan plan, cudaStream_t stream) {
  const size_t shared = static_cast<size_t>(stream_shared(call, plan));
  return with_stream_kernel<T>(plan.stages, [&](auto kernel) {
    return launch_cooperative(kernel, static_cast<unsigned>(plan.blocks), kStreamThreads, shared, stream, call);
  });
}

}  // namespace cuda
}  // namespace fastgpt
