// The instructions that C++ has no words for: shared memory, asynchronous copies, matrix products of a warp. Kernels
// are written against this layer alone, so that the emulator of a thread block (tests/cuda_host) can run them.
//
// Fragments of mma.m16n8k16, lane = 4 g + t, two 16-bit numbers a register:
//   a (16, 16): a[0] row g, columns 2t and 2t + 1; a[1] row g + 8; a[2], a[3] the same 8 columns further right
//   b (16, 8):  b0 rows 2t and 2t + 1 of column g; b1 8 rows further down
//   c (16, 8):  c[0], c[1] row g, columns 2t and 2t + 1; c[2], c[3] row g + 8
// So c of two products side by side, rounded, is a of the next product: nothing is exchanged between lanes.
// Source: the PTX manual, "Matrix fragments for mma.m16n8k16 with floating point type".
#pragma once

#include "common.cuh"

#ifndef __CUDACC__
#include "emulated_mma.h"
#else

namespace fastgpt {
namespace cuda {

__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Plain accesses to shared memory; the emulator watches them.
template <class T>
__device__ inline T load_shared(const T* address) {
  return *address;
}

template <class T>
__device__ inline void store_shared(T* address, T value) {
  *address = value;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes without holding a register: the first `bytes` from global memory, zeros behind them. Both addresses
// are aligned to 16. The copy is there after copy_async_wait, for this thread; for others after a barrier too.
__device__ inline void copy_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kLeft committed groups are under way.
template <int kLeft>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers; lanes 8 i .. 8 i + 7 bring the addresses of the rows of matrix i. Lane 4 g + t
// gets columns 2t and 2t + 1 of row g of each; transposed: rows 2t and 2t + 1 of column g.
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b in float32.
template <class T>
__device__ inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ inline void mma_16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ inline void mma_16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two numbers rounded into one register.
template <class T>
__device__ inline uint32_t pack_pair(float low, float high);

template <>
__device__ inline uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ inline uint32_t pack_pair<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 16 bytes that no other block will ask for: they pass the first cache by.
__device__ inline Pack<uint32_t> load_once(const void* address) {
  Pack<uint32_t> out;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.values[0]), "=r"(out.values[1]), "=r"(out.values[2]), "=r"(out.values[3])
               : "l"(address));
  return out;
}

// What another block of this launch may have written just now.
__device__ inline float load_fresh(const float* address) { return __ldcg(address); }

// Asks for the 128 bytes around an address to be brought into the second cache.
__device__ inline void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Launches may overlap on sm_90 (programmatic dependent launch): the next kernel of the stream may begin when all
// blocks have said let_next_begin, and sees what earlier kernels wrote only behind wait_for_previous. Without such a
// launch, and on other chips, both do nothing.
__device__ inline void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// 2^x within two units of the last place; subnormal results are 0.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace cuda
}  // namespace fastgpt

#endif
