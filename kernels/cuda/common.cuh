// What every CUDA kernel shares: element types, warp sums, launches. No torch header, no allocation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastgpt {
namespace cuda {

constexpr int kWarp = 32;

template <class T>
__device__ inline float to_float(T x) {
  return static_cast<float>(x);
}

template <class T>
__device__ inline T from_float(float x) {
  return static_cast<T>(x);
}

// The sum over the lanes of a warp, in every lane.
__device__ inline float warp_sum(float x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// 16 bytes of T, loaded and stored in one instruction.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Values that are part of a type, for lambdas that are compiled for each.
template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

template <int kValue>
struct Integer {
  static constexpr int value = kValue;
};

// Blocks of `size` items for n items, no more than `most`: kernels stride over the rest.
inline unsigned blocks_for(int64_t n, int64_t size, int64_t most) {
  const int64_t blocks = (n + size - 1) / size;
  return static_cast<unsigned>(blocks < most ? blocks : most);
}

// Starts a kernel and says whether that worked. `shared`: bytes of dynamic shared memory. A C++ compiler without CUDA
// takes kernels for the emulator of tests/cuda_host.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
#ifdef __CUDACC__
  // More than 48 KiB must be asked for.
  if (shared > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared, stream>>>(arguments...);
  return cudaGetLastError();
#else
  (void)stream;
  return emulator::launch(grid, block, shared, [=] { kernel(arguments...); });
#endif
}

// The same for a kernel that begins with wait_for_previous (mma.cuh): where `overlap`, its blocks may start while the
// kernel before it ends. Only for chips of compute capability 9, whose machine code waits.
template <class... Parameters, class... Arguments>
cudaError_t launch_chained(bool overlap, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                           cudaStream_t stream, Arguments... arguments) {
#ifdef __CUDACC__
  if (overlap) {
    if (shared > 48 * 1024) {
      const cudaError_t error = cudaFuncSetAttribute(
          reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      if (error != cudaSuccess) return error;
    }
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  }
#else
  (void)overlap;
#endif
  return launch(kernel, grid, block, shared, stream, arguments...);
}

}  // namespace cuda
}  // namespace fastgpt
