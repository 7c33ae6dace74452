// What kernels/cuda/hopper.cuh says in PTX, for the emulator. Included by it.
//
// A copy of TMA spoils its target at once and fills it at some later moment; a product spoils its accumulators and is
// done when its warp waits for it, with operands that must not have changed since it was started.
#pragma once

#include <map>
#include <utility>

#include "cuda_runtime.h"

#define FASTGPT_SM90A 1
#define __grid_constant__

namespace fastgpt {
namespace cuda {

// (column, row, head, batch) of 16-bit numbers.
struct TensorMap {
  const unsigned char* data;
  uint64_t sizes[4], steps[3];
  uint32_t box[4];
};

inline cudaError_t emulated_map(TensorMap& map, const void* data, const uint64_t (&sizes)[4],
                                const uint64_t (&steps)[3], const uint32_t (&box)[4]) {
  bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && box[0] * 2 <= 128;
  for (uint64_t size : sizes) fits = fits && size >= 1 && size <= uint64_t{1} << 32;
  for (uint64_t step : steps) fits = fits && step % 16 == 0 && step > 0 && step < uint64_t{1} << 40;
  for (uint32_t side : box) fits = fits && side >= 1 && side <= 256;
  map.data = static_cast<const unsigned char*>(data);
  std::copy(sizes, sizes + 4, map.sizes);
  std::copy(steps, steps + 3, map.steps);
  std::copy(box, box + 4, map.box);
  return fits ? cudaSuccess : cudaErrorInvalidValue;
}

// As on a GPU: the block's memory begins at an address that is no multiple of 1024.
inline uint32_t shared_address(const void* pointer) {
  const int64_t offset = static_cast<const unsigned char*>(pointer) - emulator::block->shared;
  if (offset < 0 || offset > static_cast<int64_t>(emulator::block->shared_size))
    emulator::fail("an address outside shared memory");
  return static_cast<uint32_t>(offset) + emulator::kSharedBase;
}

inline unsigned char* emulated_shared(uint32_t address, int bytes) {
  const int64_t offset = static_cast<int64_t>(address) - emulator::kSharedBase;
  if (offset < 0 || offset + bytes > static_cast<int64_t>(emulator::block->shared_size))
    emulator::fail("a product reads outside shared memory");
  return emulator::block->shared + offset;
}

using SharedAddress = uint32_t;
inline void* shared_pointer(SharedAddress address) { return emulated_shared(address, 1); }
constexpr int kBarrierBytes = 8;

inline emulator::PhaseBarrier& emulated_barrier(SharedAddress barrier) {
  const auto found = emulator::block->phase_barriers.find(barrier);
  if (found == emulator::block->phase_barriers.end()) emulator::fail("a barrier in shared memory was not initialised");
  return found->second;
}

inline void barrier_init(SharedAddress barrier, int arrivals) {
  emulated_shared(barrier, kBarrierBytes);
  if (barrier % kBarrierBytes) emulator::fail("a barrier is not aligned to 8 bytes");
  emulator::block->phase_barriers[barrier] = {arrivals, arrivals, 0, 0, {}};
}

inline void barrier_init_fence() {}
inline void barrier_arrive(SharedAddress barrier) { emulated_barrier(barrier).arrive(0); }
inline void barrier_arrive_and_expect(SharedAddress barrier, int bytes) { emulated_barrier(barrier).arrive(bytes); }

inline void barrier_wait(SharedAddress barrier, uint32_t parity) {
  const emulator::PhaseBarrier& b = emulated_barrier(barrier);
  while (b.phases % 2 == parity) emulator::wait_while(b.phases, b.phases);
  emulator::self().clock.hear(b.told);
}

inline void named_wait(int number, int threads) { emulator::named_barrier(number, threads, true); }
inline void named_arrive(int number, int threads) { emulator::named_barrier(number, threads, false); }

template <int kCount>
void give_registers() {
  static_assert(kCount >= 24 && kCount <= 256 && kCount % 8 == 0, "a count that setmaxnreg does not take");
}

template <int kCount>
void take_registers() {
  give_registers<kCount>();
}

inline void prefetch_map(const TensorMap*) {}

inline void copy_box(SharedAddress address, const TensorMap* map, SharedAddress barrier, int column, int row, int head,
                     int batch) {
  const uint32_t bytes = map->box[0] * map->box[1] * 2;
  if (address % kSwizzleBytes) emulator::fail("a tile does not begin at a multiple of 1024 bytes");
  if (map->box[0] * 2 != kPanelRowBytes) emulator::fail("the emulator copies rows of 128 bytes");
  unsigned char* const to = emulated_shared(address, static_cast<int>(bytes));
  std::memset(to, 0xff, bytes);
  emulated_barrier(barrier);
  const TensorMap tensor = *map;
  emulator::block->tiles.push_back([=] {
    for (uint32_t r = 0; r < tensor.box[1]; ++r)
      for (uint32_t c = 0; c < tensor.box[0]; ++c) {
        const int64_t at[4] = {int64_t{column} + c, int64_t{row} + r, head, batch};
        bool inside = true;
        for (int i = 0; i < 4; ++i) inside = inside && at[i] >= 0 && at[i] < static_cast<int64_t>(tensor.sizes[i]);
        const uint32_t place = swizzled(address + r * kPanelRowBytes + c * 2) - address;
        if (inside)
          std::memcpy(
              to + place,
              tensor.data + at[0] * 2 + at[1] * tensor.steps[0] + at[2] * tensor.steps[1] + at[3] * tensor.steps[2], 2);
        else
          std::memset(to + place, 0, 2);
      }
    emulated_barrier(barrier).copied(static_cast<int>(bytes));
  });
}

inline void copy_bytes(SharedAddress address, const void* from, int bytes, SharedAddress barrier) {
  unsigned char* const to = emulated_shared(address, bytes);
  if (address % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    emulator::fail("a copy of bytes is not aligned to 16");
  std::memset(to, 0xff, bytes);
  emulated_barrier(barrier);
  emulator::block->tiles.push_back([=] {
    std::memcpy(to, from, bytes);
    emulated_barrier(barrier).copied(bytes);
  });
}

// A GPU needs it only where other instructions wrote registers of the product; here every group must begin so.
inline void products_begin() {
  __syncwarp();
  emulator::self().begun = true;
}

// A matrix that a descriptor names, as raw bits: (n, 16), n the rows of a K-major or the columns of an MN-major one.
inline std::vector<uint16_t> emulated_operand(uint64_t word, int n, bool columns) {
  if (word >> 62 != 1) emulator::fail("the emulator knows the 128-byte swizzle alone");
  const uint32_t start = static_cast<uint32_t>(word & 0x3fffu) << 4;
  const uint32_t leading = static_cast<uint32_t>(word >> 16 & 0x3fffu) << 4;
  const uint32_t stride = static_cast<uint32_t>(word >> 32 & 0x3fffu) << 4;
  std::vector<uint16_t> out(static_cast<size_t>(n) * 16);
  for (int i = 0; i < n; ++i)
    for (int k = 0; k < 16; ++k) {
      const uint32_t place = columns ? start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
                                     : start + i / 8 * stride + i % 8 * 128 + k * 2;
      std::memcpy(&out[i * 16 + k], emulated_shared(swizzled(place), 2), 2);
    }
  return out;
}

// What one lane brings to a product of its warpgroup.
struct EmulatedProduct {
  float* c;
  int n;
  bool add;
  uint64_t a_word, b_word;
  const uint32_t* a;  // in registers, or nullptr
  bool b_columns;
};

// The 16 rows of `warp` of the left factor, and the right one.
inline std::pair<std::vector<uint16_t>, std::vector<uint16_t>> emulated_factors(
    const EmulatedProduct* const (&lanes)[32], int warp) {
  std::vector<uint16_t> left(16 * 16);
  const EmulatedProduct& first = *lanes[0];
  if (first.a == nullptr) {
    const std::vector<uint16_t> all = emulated_operand(first.a_word, 64, false);
    std::copy(all.begin() + warp % 4 * 256, all.begin() + (warp % 4 + 1) * 256, left.begin());
  } else {
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        for (int e = 0; e < 2; ++e)
          left[(lane / 4 + i % 2 * 8) * 16 + lane % 4 * 2 + i / 2 * 8 + e] =
              static_cast<uint16_t>(lanes[lane]->a[i] >> (e * 16));
  }
  return {std::move(left), emulated_operand(first.b_word, first.n, first.b_columns)};
}

template <class T>
float emulated_number(uint16_t bits) {
  T x;
  std::memcpy(static_cast<void*>(&x), &bits, 2);
  return static_cast<float>(x);
}

struct EmulatedLane {
  EmulatedProduct product;
  emulator::Thread* thread;
};

template <class T>
void emulated_multiply(const EmulatedProduct& product) {
  EmulatedLane mine{product, &emulator::self()};
  if (!mine.thread->begun) emulator::fail("a product without products_begin before it");
  emulator::meet("wgmma", &mine, [](void** slots) {
    // Shared by the lanes' steps: the step of lane 0 does the work of all.
    auto products = std::make_shared<std::vector<EmulatedProduct>>();
    const int warp = emulator::warp_of(*static_cast<EmulatedLane*>(slots[0])->thread);
    for (int lane = 0; lane < 32; ++lane) {
      const EmulatedLane& l = *static_cast<EmulatedLane*>(slots[lane]);
      products->push_back(l.product);
      if (l.product.a_word != (*products)[0].a_word || l.product.b_word != (*products)[0].b_word)
        emulator::fail("lanes bring different descriptors to wgmma");
      l.thread->accumulators.spoil(l.product.c, l.product.n / 2);
    }
    const auto factors = [products, warp] {
      const EmulatedProduct* lanes[32];
      for (int lane = 0; lane < 32; ++lane) lanes[lane] = &(*products)[lane];
      return emulated_factors(lanes, warp);
    };
    auto started = std::make_shared<decltype(factors())>(factors());
    std::vector<emulator::Thread*> threads;
    for (int lane = 0; lane < 32; ++lane) threads.push_back(static_cast<EmulatedLane*>(slots[lane])->thread);
    const auto work = [=] {
      if (factors() != *started) emulator::fail("an operand of wgmma changed while the product was under way");
      const auto& [left, right] = *started;
      for (int lane = 0; lane < 32; ++lane) {
        const EmulatedProduct& p = (*products)[lane];
        std::vector<float>& c = threads[lane]->accumulators.of(p.c);
        for (int i = 0; i < p.n / 2; ++i) {
          const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
          float sum = 0.0f;
          for (int k = 0; k < 16; ++k)
            sum += emulated_number<T>(left[row * 16 + k]) * emulated_number<T>(right[column * 16 + k]);
          c[i] = p.add ? c[i] + sum : sum;
        }
      }
    };
    for (int lane = 0; lane < 32; ++lane)
      threads[lane]->products.push_back({lane == 0 ? std::function<void()>(work) : [] {}, (*products)[lane].c, -1});
  });
}

inline void products_commit() {
  emulator::Thread& t = emulator::self();
  for (emulator::Product& product : t.products)
    if (product.group < 0) product.group = t.product_groups;
  ++t.product_groups;
  t.begun = false;
}

template <int kLeft>
void products_wait() {
  emulator::Thread* mine = &emulator::self();
  emulator::meet("wgmma.wait_group", mine, [](void** lanes) {
    const auto due = [](const emulator::Thread& t) {
      return !t.products.empty() && t.products.front().group >= 0 &&
             t.products.front().group < t.product_groups - kLeft;
    };
    emulator::Thread& first = *static_cast<emulator::Thread*>(lanes[0]);
    while (due(first)) {
      first.products.front().work();
      for (int lane = 0; lane < 32; ++lane) static_cast<emulator::Thread*>(lanes[lane])->finish_product();
    }
  });
}

template <int kN>
void hold(float (&)[kN][4]) {}
template <int kN>
void hold(uint32_t (&)[kN][4]) {}
inline void hold(uint32_t&) {}
inline void after_sum(float) {}

template <class T, bool kAdd, int kN>
void multiply_rows(float (&c)[kN][4], uint64_t a, uint64_t b) {
  emulated_multiply<T>({&c[0][0], kN * 8, kAdd, a, b, nullptr, false});
}

template <class T, bool kAdd, int kN>
void multiply_rows(float (&c)[kN][4], const uint32_t (&a)[4], uint64_t b) {
  emulated_multiply<T>({&c[0][0], kN * 8, kAdd, 0, b, a, false});
}

template <class T, int kN>
void multiply_columns(float (&c)[kN][4], const uint32_t (&a)[4], uint64_t b) {
  emulated_multiply<T>({&c[0][0], kN * 8, true, 0, b, a, true});
}

}  // namespace cuda
}  // namespace fastgpt
