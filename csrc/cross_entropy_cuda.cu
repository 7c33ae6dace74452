// Launches of kernels/cuda/cross_entropy.cuh by dtype.
#include "../kernels/cuda/cross_entropy.cuh"
#include "cuda_launch.h"

namespace fastgpt {
namespace cuda {
namespace {

template <class T>
int run(float* losses, void* logits, const int64_t* targets, const int64_t* count, const CrossEntropyCall& call) {
  const CrossEntropy<T> a = {losses,
                             static_cast<T*>(logits),
                             targets,
                             count,
                             call.rows,
                             call.ignore_index,
                             static_cast<int>(call.vocab_size),
                             static_cast<int>(call.padded),
                             call.gradient};
  return cross_entropy(a, static_cast<cudaStream_t>(call.stream));
}

}  // namespace

int cross_entropy(float* losses, void* logits, const int64_t* targets, const int64_t* count,
                  const CrossEntropyCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return run<float>(losses, logits, targets, count, call);
    case DType::kBFloat16: return run<__nv_bfloat16>(losses, logits, targets, count, call);
    case DType::kFloat16: return run<__half>(losses, logits, targets, count, call);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastgpt
