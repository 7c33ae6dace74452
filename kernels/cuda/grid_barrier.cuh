// A barrier over all blocks of a launch, and memory that one block writes and another reads between two barriers.
//
// One counter in global memory, 0 when the launch begins, only grows: a block adds 1 when it arrives and goes on when
// the counter has reached (barriers so far) * (blocks). Numbers are compared by their difference, so the counter may
// pass 2^32. All blocks must be resident at once, which a cooperative launch guarantees or refuses.
//
// Order: what a block wrote before it arrived is seen by every block that goes on. The block's threads meet, one of
// them arrives with a release and waits with an acquire, both of GPU scope, and they meet again; that is cumulative
// (PTX manual, "Memory consistency model"). read_l2 and write_l2 pass the first cache by, where nothing read after a
// barrier can be; the emulator watches them, and finds blocks that meet in one place without a barrier between them.
#pragma once

#include "mma.cuh"

namespace fastgpt {
namespace cuda {

// Which number the counter must reach.
struct BarrierCount {
  uint32_t blocks, target;

  __host__ __device__ uint32_t next() { return target += blocks; }

  __host__ __device__ static bool reached(uint32_t count, uint32_t target) {
    return static_cast<int32_t>(count - target) >= 0;
  }
};

}  // namespace cuda
}  // namespace fastgpt

#ifndef __CUDACC__
#include "emulated_grid.h"
#else

namespace fastgpt {
namespace cuda {

__device__ inline void arrive(uint32_t* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}

__device__ inline void wait_until(const uint32_t* counter, uint32_t target) {
  uint32_t count;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  } while (!BarrierCount::reached(count, target));
}

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned;
};
template <>
struct Word<8> {
  using Type = unsigned long long;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// For the emulator.
__device__ inline void passed_grid_barrier() {}

template <class T>
__device__ inline T read_l2(const T* address) {
  using W = typename Word<sizeof(T)>::Type;
  const W word = __ldcg(reinterpret_cast<const W*>(address));
  T out;
  memcpy(&out, &word, sizeof(T));
  return out;
}

template <class T>
__device__ inline void write_l2(T* address, T value) {
  using W = typename Word<sizeof(T)>::Type;
  W word;
  memcpy(&word, &value, sizeof(T));
  __stcg(reinterpret_cast<W*>(address), word);
}

// Starts a kernel whose blocks are all resident at once, or says that they cannot be.
template <class... Parameters, class... Arguments>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared,
                               cudaStream_t stream, Arguments... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Multiprocessors of a chip that has cooperative launches, else 0.
inline cudaError_t cooperative_multiprocessors(int* count) {
  *count = 0;
  int device = 0, cooperative = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device);
  if (error != cudaSuccess || cooperative == 0) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// Blocks of this kernel that one multiprocessor holds at once.
template <class... Parameters>
cudaError_t resident_blocks(void (*kernel)(Parameters...), unsigned threads, size_t shared, int* blocks) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, function, static_cast<int>(threads), shared);
}

}  // namespace cuda
}  // namespace fastgpt

#endif

namespace fastgpt {
namespace cuda {

struct GridBarrier {
  uint32_t* counter;
  BarrierCount count;

  // All threads of all blocks.
  __device__ void wait() {
    __syncthreads();
    const uint32_t target = count.next();
    if (threadIdx.x == 0) {
      arrive(counter);
      wait_until(counter, target);
    }
    __syncthreads();
    passed_grid_barrier();
  }
};

}  // namespace cuda
}  // namespace fastgpt
