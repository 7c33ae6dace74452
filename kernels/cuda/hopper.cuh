// The instructions of sm_90a that C++ has no words for: barriers in shared memory that count bytes (mbarrier), tiles
// copied by one thread (TMA), products of a warpgroup (wgmma), registers moved between warpgroups. Kernels are written
// against this layer alone, so that the emulator of a thread block (tests/cuda_host) can run them.
//
// Fragments of wgmma.m64nNk16: warp w of the four holds rows 16 w .. 16 w + 15, as the accumulators c and the left
// factor a of mma.m16n8k16 (mma.cuh), c[n] for the columns 8 n .. 8 n + 7. So c of one product, rounded, is a of the
// next. Source: the PTX manual, "Asynchronous Warpgroup Level Matrix Instructions", "mbarrier", "cp.async.bulk.tensor".
#pragma once

#include "hopper_layout.h"
#include "mma.cuh"

#ifndef __CUDACC__
#include "emulated_hopper.h"
#else

#include <cuda.h>

// Machine code of sm_90a alone has these instructions; kernels are empty elsewhere, and never launched.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define FASTGPT_SM90A 1
#else
#define FASTGPT_SM90A 0
#endif

namespace fastgpt {
namespace cuda {

// What TMA knows of a tensor; made on the host (csrc/cuda_tensor_map.h).
using TensorMap = CUtensorMap;

// Shared memory by 32-bit addresses, as the instructions take it: half the registers of pointers.
using SharedAddress = uint32_t;
constexpr int kBarrierBytes = 8;

__device__ inline void barrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Between barrier_init and the block's first __syncthreads, so that TMA finds the barriers.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and makes this phase end only when `bytes` more have been copied.
__device__ inline void barrier_arrive_and_expect(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over.
__device__ inline void barrier_wait(SharedAddress barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// Shared memory by address, for ordinary accesses.
__device__ inline void* shared_pointer(SharedAddress address) {
  return dynamic_shared() + (address - shared_address(dynamic_shared()));
}

// Barriers among some warps of the block, by number from 1; `threads` counts all that arrive or wait.
__device__ inline void named_wait(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ inline void named_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Gives registers of this warpgroup back, or waits for more: kCount for each thread from here on.
template <int kCount>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

__device__ inline void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Starts the copy of the map's box at (column, row, head, batch); zeros beyond the tensor. Its bytes, zeros too, count
// for the barrier.
__device__ inline void copy_box(SharedAddress shared, const TensorMap* map, SharedAddress barrier, int column, int row,
                                int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Starts the copy of so many bytes, a multiple of 16, between addresses that are too.
__device__ inline void copy_bytes(SharedAddress shared, const void* global, int bytes, SharedAddress barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

// Before the first product, and after registers of one were written by other instructions.
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kLeft committed groups are under way.
template <int kLeft>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Keeps the compiler from moving uses of these registers across: a product under way has them.
template <int kN>
__device__ inline void hold(float (&c)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}

template <int kN>
__device__ inline void hold(uint32_t (&a)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[n][i])::"memory");
}

// What follows is not started before x >= 0 is known: the branch, never taken, is one that ptxas moves no wait across.
__device__ inline void after_sum(float x) {
  asm volatile(
      "{\n"
      ".reg .pred never;\n"
      "setp.lt.f32 never, %0, 0f00000000;\n"
      "@never nanosleep.u32 0;\n"
      "}\n" ::"f"(x)
      : "memory");
}

// The compiler forgets what it has made of x.
__device__ inline void hold(uint32_t& x) { asm volatile("" : "+r"(x)); }

// The products of one type with 8 kN columns.
template <class T, int kN>
struct Products;

// clang-format off
#define FASTGPT_C1(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define FASTGPT_C8(n) \
  FASTGPT_C1(n), FASTGPT_C1(n + 1), FASTGPT_C1(n + 2), FASTGPT_C1(n + 3), \
  FASTGPT_C1(n + 4), FASTGPT_C1(n + 5), FASTGPT_C1(n + 6), FASTGPT_C1(n + 7)
#define FASTGPT_C16(n) FASTGPT_C8(n), FASTGPT_C8(n + 8)
#define FASTGPT_NAMES32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define FASTGPT_NAMES64 \
  FASTGPT_NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// clang-format on

// `factors` and `add` name operands behind the accumulators; then the signs of a and b, and in `columns` which of them
// lie by columns.
#define FASTGPT_WGMMA(shape, type, names, accumulators, factors, add, columns, ...)                       \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\nwgmma.mma_async.sync.aligned.m64" shape \
               "k16.f32." type "." type " {" names "}, " factors ", add, 1, 1, " columns ";\n}\n"         \
               : accumulators(0)                                                                          \
               : __VA_ARGS__)

#define FASTGPT_PRODUCTS(T, type, kN, shape, names, accumulators, shared, shared_add, left, left_add, left_columns)  \
  template <>                                                                                                        \
  struct Products<T, kN> {                                                                                           \
    template <int kAdd>                                                                                              \
    static __device__ void from_shared(float (&c)[kN][4], uint64_t a, uint64_t b) {                                  \
      FASTGPT_WGMMA(shape, type, names, accumulators, shared, shared_add, "0, 0", "l"(a), "l"(b), "n"(kAdd));        \
    }                                                                                                                \
    template <int kAdd, int kColumns>                                                                                \
    static __device__ void from_registers(float (&c)[kN][4], const uint32_t (&a)[4], uint64_t b) {                   \
      FASTGPT_WGMMA(shape, type, names, accumulators, left, left_add, left_columns, "r"(a[0]), "r"(a[1]), "r"(a[2]), \
                    "r"(a[3]), "l"(b), "n"(kAdd), "n"(kColumns));                                                    \
    }                                                                                                                \
  };

#define FASTGPT_PRODUCTS_OF(T, type)                                                                                  \
  FASTGPT_PRODUCTS(T, type, 8, "n64", FASTGPT_NAMES32, FASTGPT_C8, "%32, %33", "%34", "{%32, %33, %34, %35}, %36",    \
                   "%37", "%38")                                                                                      \
  FASTGPT_PRODUCTS(T, type, 16, "n128", FASTGPT_NAMES64, FASTGPT_C16, "%64, %65", "%66", "{%64, %65, %66, %67}, %68", \
                   "%69", "%70")

FASTGPT_PRODUCTS_OF(__nv_bfloat16, "bf16")
FASTGPT_PRODUCTS_OF(__half, "f16")

#undef FASTGPT_PRODUCTS_OF
#undef FASTGPT_PRODUCTS
#undef FASTGPT_WGMMA
#undef FASTGPT_NAMES64
#undef FASTGPT_NAMES32
#undef FASTGPT_C16
#undef FASTGPT_C8
#undef FASTGPT_C1

// c (64, 64 or 128) = a b^T, or += it, of 16 columns: b in shared memory by rows_descriptor, a too or in registers.
template <class T, bool kAdd, int kN>
__device__ inline void multiply_rows(float (&c)[kN][4], uint64_t a, uint64_t b) {
  Products<T, kN>::template from_shared<kAdd>(c, a, b);
}

template <class T, bool kAdd, int kN>
__device__ inline void multiply_rows(float (&c)[kN][4], const uint32_t (&a)[4], uint64_t b) {
  Products<T, kN>::template from_registers<kAdd, 0>(c, a, b);
}

// c (64, 64 or 128) += a b: a in registers, b of 16 rows in shared memory, by columns_descriptor.
template <class T, int kN>
__device__ inline void multiply_columns(float (&c)[kN][4], const uint32_t (&a)[4], uint64_t b) {
  Products<T, kN>::template from_registers<1, 1>(c, a, b);
}

}  // namespace cuda
}  // namespace fastgpt

#endif
