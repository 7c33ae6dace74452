// Kernels with one fault each, and one without: what the emulator must tell apart.
#include "../../kernels/cuda/mma.cuh"

namespace {

using namespace fastgpt::cuda;

enum Fault { kNone, kNoWait, kNoBarrier, kOverwrite, kStrayLane, kDeadlock, kOutside, kNotWaitedFor };

// Copies 16 bytes a thread and reads those of another warp.
__global__ void copy_kernel(float* out, const float* in, int fault) {
  float* shared = reinterpret_cast<float*>(dynamic_shared());
  const int thread = threadIdx.x, other = (thread + kWarp) % blockDim.x;
  copy_async_16(shared + thread * 4, in + thread * 4, 16);
  copy_async_commit();
  if (fault == kNoWait || fault == kNotWaitedFor) {
    copy_async_wait<1>();
  } else {
    copy_async_wait<0>();
  }
  if (fault == kDeadlock && thread == 5) return;
  if (fault != kNoBarrier) __syncthreads();
  if (fault == kOutside && thread == 3) store_shared(shared + blockDim.x * 4, 1.0f);
  for (int i = 0; i < 4; ++i) out[thread * 4 + i] = load_shared(shared + other * 4 + i);
  if (fault == kOverwrite) store_shared(shared + thread * 4, 0.0f);
  if (fault == kStrayLane && thread == 7) {
    __syncwarp();
  } else {
    out[thread * 4] += warp_sum(0.0f);
  }
  if (fault == kNoWait) copy_async_wait<0>();
}

}  // namespace

// in, out: 256 numbers. Returns what went wrong, or nullptr.
extern "C" const char* run_copy(float* out, const float* in, int fault) {
  const cudaError_t error = launch(copy_kernel, 1, 64, 1024, nullptr, out, in, fault);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
