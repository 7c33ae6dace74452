// Stands in for CUDA's header where kernels are compiled for the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::emulator::self().index)
#define blockIdx (::emulator::block->index)
#define blockDim (::emulator::block->size)
#define gridDim (::emulator::block->grid)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 2;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == 1 ? emulator::last_error.c_str() : "invalid argument";
}

inline void __syncthreads() { emulator::sync_threads(); }

inline void __threadfence() {}

inline void __syncwarp(unsigned = 0xffffffffu) {
  int nothing = 0;
  emulator::meet("__syncwarp", &nothing, [](void**) {});
}

// What `pick` says of each lane's value: result of lane = value of lane pick(lane).
template <class T, class Pick>
T emulated_shuffle(T value, Pick pick) {
  struct Lane {
    T in, out;
  } mine{value, value};
  emulator::meet("a shuffle", &mine, [&](void** lanes) {
    for (int lane = 0; lane < emulator::kLanes; ++lane)
      static_cast<Lane*>(lanes[lane])->out = static_cast<Lane*>(lanes[pick(lane)])->in;
  });
  return mine.out;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated_shuffle(value, [mask](int lane) { return lane ^ mask; });
}

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  struct Lane {
    T in, out;
    int from;
  } mine{value, value, from};
  emulator::meet("a shuffle", &mine, [](void** lanes) {
    for (int lane = 0; lane < emulator::kLanes; ++lane) {
      Lane* to = static_cast<Lane*>(lanes[lane]);
      to->out = static_cast<Lane*>(lanes[to->from & 31])->in;
    }
  });
  return mine.out;
}

// Blocks run one after another and threads change only where they wait.
template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __expf(float x) { return std::exp(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>((uint64_t{a} * b) >> 32); }
inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
using std::isnan;
using std::max;
using std::min;
