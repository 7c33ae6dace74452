// What kernels/cuda/mma.cuh says in PTX, for the emulator. Included by it.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

namespace fastgpt {
namespace cuda {

inline unsigned char* dynamic_shared() { return emulator::block->shared; }

template <class T>
T load_shared(const T* address) {
  emulator::watch(address, sizeof(T), false);
  return *address;
}

template <class T>
void store_shared(T* address, T value) {
  emulator::watch(address, sizeof(T), true);
  *address = value;
}

inline void copy_async_16(void* shared, const void* global, int bytes) {
  using namespace emulator;
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes < 0 || bytes > 16)
    fail("an asynchronous copy is not aligned to 16 bytes, or not of 0 to 16 bytes");
  watch(shared, 16, true);
  Copy copy{};
  copy.to = static_cast<unsigned char*>(shared);
  std::memcpy(copy.bytes, global, bytes);
  std::memset(shared, 0xff, 16);
  self().copies.push_back(copy);
}

inline void copy_async_commit() {
  emulator::Thread& t = emulator::self();
  for (emulator::Copy& copy : t.copies)
    if (!copy.committed) {
      copy.committed = true;
      copy.group = t.groups;
    }
  ++t.groups;
}

// Waits until at most kLeft of this thread's groups are under way.
template <int kLeft>
void copy_async_wait() {
  emulator::Thread& t = emulator::self();
  while (!t.copies.empty() && t.copies.front().committed && t.copies.front().group < t.groups - kLeft) {
    const emulator::Copy& copy = t.copies.front();
    emulator::watch(copy.to, 16, true);
    std::memcpy(copy.to, copy.bytes, 16);
    t.copies.pop_front();
  }
}

inline Pack<uint32_t> load_once(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) emulator::fail("a load of 16 bytes is not aligned");
  return *static_cast<const Pack<uint32_t>*>(address);
}

inline float load_fresh(const float* address) { return *address; }
inline void prefetch(const void*) {}
inline void let_next_begin() {}
inline void wait_for_previous() {}

struct EmulatedMatrices {
  const void* row;
  uint32_t* out;
};

template <bool kTransposed>
void emulated_load_matrices(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulator::fail("a row of ldmatrix is not aligned to 16 bytes");
  emulator::watch(row, 16, false);
  EmulatedMatrices mine{row, out};
  emulator::meet(kTransposed ? "ldmatrix.trans" : "ldmatrix", &mine, [](void** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
          const int long_side = lane / 4, short_side = lane % 4 * 2 + e;
          const int from_row = kTransposed ? short_side : long_side, column = kTransposed ? long_side : short_side;
          const void* address = static_cast<EmulatedMatrices*>(lanes[matrix * 8 + from_row])->row;
          pair[e] = static_cast<const uint16_t*>(address)[column];
        }
        std::memcpy(&static_cast<EmulatedMatrices*>(lanes[lane])->out[matrix], pair, 4);
      }
  });
}

inline void load_matrices(uint32_t (&out)[4], const void* row) { emulated_load_matrices<false>(out, row); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) { emulated_load_matrices<true>(out, row); }

template <class T>
void emulated_unpack(float* to, uint32_t word) {
  T pair[2];
  std::memcpy(static_cast<void*>(pair), &word, 4);
  to[0] = static_cast<float>(pair[0]);
  to[1] = static_cast<float>(pair[1]);
}

struct EmulatedMma {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// c += a b, a (16, 16), b (16, 8): the fragments as the PTX manual draws them for mma.m16n8k16.
template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  EmulatedMma mine{c, a, {b0, b1}};
  emulator::meet("mma", &mine, [](void** lanes) {
    float left[16][16], right[16][8], sum[16][8] = {}, pair[2];
    for (int lane = 0; lane < 32; ++lane) {
      const EmulatedMma& m = *static_cast<EmulatedMma*>(lanes[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i) {
        emulated_unpack<T>(pair, m.a[i]);
        for (int e = 0; e < 2; ++e) left[g + i % 2 * 8][t * 2 + i / 2 * 8 + e] = pair[e];
      }
      for (int i = 0; i < 2; ++i) {
        emulated_unpack<T>(pair, m.b[i]);
        for (int e = 0; e < 2; ++e) right[t * 2 + i * 8 + e][g] = pair[e];
      }
    }
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k)
        for (int column = 0; column < 8; ++column) sum[row][column] += left[row][k] * right[k][column];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        static_cast<EmulatedMma*>(lanes[lane])->c[i] += sum[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

template <class T>
uint32_t pack_pair(float low, float high) {
  const T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
  uint32_t word;
  std::memcpy(&word, pair, 4);
  return word;
}

inline float fast_exp2(float x) { return std::exp2(x); }

}  // namespace cuda
}  // namespace fastgpt
