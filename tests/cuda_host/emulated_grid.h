// What kernels/cuda/grid_barrier.cuh says in PTX, for the emulator: all blocks of a cooperative launch, in turns.
// Included by it.
//
// Blocks take turns in an order that the seed gives, each as far as its threads can go, or one round, as is drawn. What
// read_l2 and write_l2 touch is watched: two blocks at the same place with no barrier of the grid between them fail
// where one of them writes. Blocks that wait for each other for ever fail too.
#pragma once

#include <unordered_map>

#include "cuda_runtime.h"

#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace emulator {

inline int multiprocessors = 3;
// Grows when a counter of a barrier changes: who waits for one looks again.
inline uint64_t arrivals = 0;

// The last accesses to 2 bytes of global memory: between which barriers of the grid, and of which block (-2: several).
struct GlobalWatch {
  int64_t written = -1, read = -1;
  int writer = -1, reader = -1;
};
inline std::unordered_map<uintptr_t, GlobalWatch> global_watches;
// Barriers of the grid that each thread has passed, by block and thread.
inline std::vector<std::vector<int64_t>> grid_barriers;

inline void watch_global(const void* address, size_t bytes, bool write) {
  const int mine = static_cast<int>(block->index.x);
  const int64_t epoch = grid_barriers[mine][self().linear];
  const uintptr_t begin = reinterpret_cast<uintptr_t>(address);
  if (begin % bytes) fail("an access to global memory is not aligned");
  for (uintptr_t place = begin / 2; place <= (begin + bytes - 1) / 2; ++place) {
    GlobalWatch& w = global_watches[place];
    if ((w.written == epoch && w.writer != mine) || (write && w.read == epoch && w.reader != mine))
      fail("two blocks access the same global memory without a barrier of the grid between, and one writes");
    if (write) {
      w.written = epoch;
      w.writer = mine;
    } else {
      w.reader = w.read == epoch && w.reader != mine ? -2 : mine;
      w.read = epoch;
    }
  }
}

inline int launch_cooperative(unsigned blocks, unsigned threads, size_t shared, std::function<void()> kernel) {
  ++launches;
  if (threads == 0 || threads > 1024 || threads % kLanes != 0 || shared > kMostShared || blocks == 0 ||
      static_cast<int>(blocks) > multiprocessors) {
    last_error = "the blocks of a cooperative launch are not all resident, or have sizes that no GPU takes";
    return 1;
  }
  std::mt19937_64 random(seed);
  global_watches.clear();
  grid_barriers.assign(blocks, std::vector<int64_t>(threads, 0));
  body = std::move(kernel);
  std::vector<std::vector<unsigned char>> memories;
  std::vector<std::unique_ptr<Block>> all;
  std::vector<std::vector<Thread*>> orders(blocks);
  for (unsigned i = 0; i < blocks; ++i) {
    all.push_back(std::make_unique<Block>());
    Block& b = *all.back();
    b.grid = dim3(blocks);
    b.size = dim3(threads);
    b.index = dim3(i, 0, 0);
    b.shared_size = (shared + kWatched - 1) / kWatched * kWatched;
    // All bits set is NaN in every floating-point type.
    memories.emplace_back(b.shared_size + 128, static_cast<unsigned char>(0xff));
    b.shared = memories[i].data() + (128 - reinterpret_cast<uintptr_t>(memories[i].data()) % 128);
    b.watches.resize(b.shared_size / kWatched);
    b.warps.resize(threads / kLanes);
    for (unsigned t = 0; t < threads; ++t) {
      b.threads.push_back(std::make_unique<Thread>());
      b.threads[t]->linear = static_cast<int>(t);
      b.threads[t]->index = dim3(t, 0, 0);
      b.threads[t]->fiber.start(&thread_main);
      orders[i].push_back(b.threads[t].get());
    }
  }
  std::vector<unsigned> turns(blocks);
  for (unsigned i = 0; i < blocks; ++i) turns[i] = i;
  std::string error;
  bool ran = true;
  while (ran && error.empty()) {
    ran = false;
    std::shuffle(turns.begin(), turns.end(), random);
    for (unsigned i : turns) {
      block = all[i].get();
      const bool whole = random() % 2;
      while (run_round(orders[i], random)) {
        ran = true;
        if (!whole) break;
      }
      error = block->error;
      if (!error.empty()) break;
    }
  }
  for (unsigned i = 0; i < blocks && error.empty(); ++i)
    for (auto& t : all[i]->threads)
      if (!t->done && error.empty())
        error = "threads wait for each other for ever (thread " + std::to_string(t->linear) + " of block " +
                std::to_string(i) + ")";
  block = nullptr;
  if (error.empty()) return 0;
  last_error = error;
  return 1;
}

}  // namespace emulator

namespace fastgpt {
namespace cuda {

inline void arrive(uint32_t* counter) {
  ++*counter;
  ++emulator::arrivals;
}

inline void wait_until(const uint32_t* counter, uint32_t target) {
  while (!BarrierCount::reached(*counter, target)) emulator::wait_while(emulator::arrivals, emulator::arrivals);
}

inline void passed_grid_barrier() { ++emulator::grid_barriers[emulator::block->index.x][emulator::self().linear]; }

template <class T>
T read_l2(const T* address) {
  emulator::watch_global(address, sizeof(T), false);
  return *address;
}

template <class T>
void write_l2(T* address, T value) {
  emulator::watch_global(address, sizeof(T), true);
  *address = value;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared,
                               cudaStream_t, Arguments... arguments) {
  return emulator::launch_cooperative(blocks, threads, shared, [=] { kernel(arguments...); });
}

inline cudaError_t cooperative_multiprocessors(int* count) {
  *count = emulator::multiprocessors;
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t resident_blocks(void (*)(Parameters...), unsigned, size_t shared, int* blocks) {
  *blocks = shared <= emulator::kMostShared;
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace fastgpt
