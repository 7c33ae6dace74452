// A GPU thread block on the CPU, for tests: one fiber a thread, so that whole kernels of kernels/cuda run without a
// GPU.
//
// What it does beyond running: the order of the threads is drawn from a seed; shared memory holds NaN until it is
// written; an asynchronous copy spoils its target at once and fills it only when its thread waits for it; accesses
// through kernels/cuda/mma.cuh and shared.cuh are watched, so that two warps that touch the same 16 bytes without a
// barrier between them fail, whatever the order was; threads that wait for each other for ever fail. What it does not
// do: blocks run one after another, warps have no timing, and ordinary loads and stores are not watched.
//
// An error ends the launch; cudaGetErrorString then tells it, so that Python gets it as an exception with the op's
// name.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int kLanes = 32;
constexpr size_t kMostShared = 227 * 1024;
constexpr size_t kWatched = 16;  // bytes
// Where a block's dynamic shared memory begins in the 32-bit addresses of shared memory.
constexpr uint32_t kSharedBase = 128;

// How far each warp had come when it was last heard of: an arrival at a barrier tells it, who waits there hears it.
struct Clock {
  std::vector<int64_t> times;

  int64_t of(int warp) const { return warp < static_cast<int>(times.size()) ? times[warp] : 0; }
  void hear(const Clock& other) {
    if (times.size() < other.times.size()) times.resize(other.times.size());
    for (size_t i = 0; i < other.times.size(); ++i) times[i] = std::max(times[i], other.times[i]);
  }
  void go_on(int warp) {
    if (static_cast<int>(times.size()) <= warp) times.resize(warp + 1);
    ++times[warp];
  }
};

// One asynchronous copy that has been issued and not been waited for.
struct Copy {
  unsigned char* to;
  unsigned char bytes[16];
  bool committed = false;
  int group = 0;
};

// Accumulators of products under way (wgmma): spoilt where they are, kept here.
struct Accumulators {
  struct Kept {
    std::vector<float> values;
    int products = 0;
  };
  std::map<float*, Kept> kept;

  void spoil(float* c, int count) {
    Kept& k = kept[c];
    if (k.products++ > 0) return;
    k.values.assign(c, c + count);
    std::memset(static_cast<void*>(c), 0xff, sizeof(float) * count);
  }
  std::vector<float>& of(float* c) { return kept[c].values; }
};

// One product that has been started and not been waited for. work: of the whole warp, with lane 0.
struct Product {
  std::function<void()> work;
  float* c;
  int group;  // -1: not committed
};

struct Thread {
  Fiber fiber;
  dim3 index;
  int linear = 0;
  bool done = false;
  // It may go on when this counter has left this value.
  const uint64_t* waits_for = nullptr;
  uint64_t value = 0;
  Clock clock;
  std::deque<Copy> copies;
  int groups = 0;
  Accumulators accumulators;
  std::deque<Product> products;
  int product_groups = 0;
  bool begun = false;  // products, since the last commit

  // The first product is done: its accumulators come back with the last product that has them.
  void finish_product();
};

// A barrier in shared memory (mbarrier): a phase ends when all have arrived and all bytes have been copied.
struct PhaseBarrier {
  int arrivals, pending;
  int64_t bytes;
  uint64_t phases;  // that are over
  Clock told;

  void arrive(int more_bytes);
  void copied(int done_bytes) {
    bytes -= done_bytes;
    end_phase();
  }
  void end_phase();
};

struct Meeting {
  const char* what = nullptr;
  int arrived = 0;
  uint64_t generation = 0;
  void* slots[kLanes] = {};
  Clock told, heard;  // by this generation; by the last one
};

// The last accesses to 16 bytes of shared memory: of which warps, and when by their clocks.
struct Watch {
  int writer = -1;
  int64_t written = 0;
  std::vector<std::pair<int, int64_t>> readers;  // since then
};

struct Block {
  dim3 grid, size, index;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Meeting> warps;
  Meeting barrier;
  unsigned char* shared = nullptr;
  size_t shared_size = 0;
  std::vector<Watch> watches;
  std::map<uint32_t, PhaseBarrier> phase_barriers;
  std::vector<std::function<void()>> tiles;  // copies of TMA under way
  Meeting named[16];
  Thread* current = nullptr;
  Fiber scheduler;
  std::string error;
};

inline Block* block = nullptr;
inline std::string last_error;
inline uint64_t seed = 0;
inline int64_t launches = 0;

inline Thread& self() { return *block->current; }
inline int warp_of(const Thread& thread) { return thread.linear / kLanes; }

// Leaves this thread for good; the launch ends.
[[noreturn]] inline void fail(const std::string& message) {
  const Thread& t = self();
  if (block->error.empty())
    block->error = message + " (block " + std::to_string(block->index.x) + "," + std::to_string(block->index.y) +
                   ", thread " + std::to_string(t.linear) + ")";
  while (true) switch_fiber(block->current->fiber, block->scheduler);
}

inline void Thread::finish_product() {
  float* c = products.front().c;
  products.pop_front();
  Accumulators::Kept& k = accumulators.kept[c];
  if (--k.products > 0) return;
  for (size_t i = 0; i < k.values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, c + i, 4);
    if (bits != 0xffffffffu) fail("accumulators were written while a product was under way");
    c[i] = k.values[i];
  }
  accumulators.kept.erase(c);
}

inline void PhaseBarrier::arrive(int more_bytes) {
  Thread& t = self();
  t.clock.go_on(warp_of(t));
  told.hear(t.clock);
  bytes += more_bytes;
  --pending;
  end_phase();
}

inline void PhaseBarrier::end_phase() {
  if (pending < 0) fail("more threads arrive at a barrier than it waits for");
  if (pending > 0 || bytes != 0) return;
  pending = arrivals;
  ++phases;
}

inline void wait_while(const uint64_t& counter, uint64_t value) {
  Thread& t = self();
  while (counter == value) {
    t.waits_for = &counter;
    t.value = value;
    switch_fiber(t.fiber, block->scheduler);
  }
  t.waits_for = nullptr;
}

// All 32 lanes meet; the last one runs op over what they brought, which stays where it is meanwhile.
template <class Op>
void meet(const char* what, void* brought, Op op) {
  Thread& t = self();
  Meeting& warp = block->warps[warp_of(t)];
  if (warp.arrived > 0 && warp.what != what) fail(std::string("a lane is at ") + what + ", another at " + warp.what);
  warp.what = what;
  warp.slots[t.linear % kLanes] = brought;
  if (++warp.arrived < kLanes) {
    wait_while(warp.generation, warp.generation);
    return;
  }
  warp.arrived = 0;
  op(warp.slots);
  ++warp.generation;
}

// Arrives at a barrier of so many threads, and where it `waits` goes on when all have.
inline void arrive_at(Meeting& barrier, int threads, bool waits) {
  Thread& t = self();
  t.clock.go_on(warp_of(t));
  barrier.told.hear(t.clock);
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    barrier.heard = std::move(barrier.told);
    barrier.told = Clock{};
    ++barrier.generation;
  } else if (waits) {
    wait_while(barrier.generation, barrier.generation);
  }
  if (waits) t.clock.hear(barrier.heard);
}

inline void sync_threads() { arrive_at(block->barrier, static_cast<int>(block->threads.size()), true); }

// bar.sync, or bar.arrive where not `waits`.
inline void named_barrier(int number, int threads, bool waits) {
  if (number < 1 || number > 15 || threads % kLanes != 0) fail("a named barrier that no GPU has");
  arrive_at(block->named[number], threads, waits);
}

// Ends one copy of TMA that is under way, which one the seed says; false when there is none.
inline bool end_tile(std::mt19937_64& random) {
  if (block->tiles.empty()) return false;
  std::swap(block->tiles[random() % block->tiles.size()], block->tiles.back());
  const std::function<void()> copy = std::move(block->tiles.back());
  block->tiles.pop_back();
  copy();
  return true;
}

// Notes an access to shared memory, and fails where it races with an earlier one.
inline void watch(const void* address, size_t bytes, bool write) {
  const unsigned char* begin = static_cast<const unsigned char*>(address);
  if (begin < block->shared || begin + bytes > block->shared + block->shared_size)
    fail("an access outside shared memory");
  const Thread& t = self();
  const int warp = warp_of(t);
  const size_t first = (begin - block->shared) / kWatched, last = (begin + bytes - 1 - block->shared) / kWatched;
  for (size_t i = first; i <= last; ++i) {
    Watch& w = block->watches[i];
    // Of its own warp and of what it has heard of, a thread knows that it is over.
    const auto over = [&](int other, int64_t time) { return other == warp || t.clock.of(other) >= time; };
    bool races = w.writer >= 0 && !over(w.writer, w.written);
    if (write)
      for (const auto& [reader, read] : w.readers) races = races || !over(reader, read);
    if (races)
      fail("two warps access byte " + std::to_string(i * kWatched) +
           " of shared memory without a barrier between, and one writes");
    const int64_t now = t.clock.of(warp) + 1;  // told by the next arrival
    if (write) {
      w.written = now;
      w.writer = warp;
      w.readers.clear();
    } else {
      const auto mine =
          std::find_if(w.readers.begin(), w.readers.end(), [&](const auto& reader) { return reader.first == warp; });
      if (mine == w.readers.end())
        w.readers.push_back({warp, now});
      else
        mine->second = now;
    }
  }
}

// The next threads to run, in an order that the seed gives; false when none can.
inline bool run_round(std::vector<Thread*>& order, std::mt19937_64& random) {
  std::shuffle(order.begin(), order.end(), random);
  bool ran = false;
  for (Thread* t : order) {
    if (t->done || (t->waits_for != nullptr && *t->waits_for == t->value)) continue;
    block->current = t;
    switch_fiber(block->scheduler, t->fiber);
    ran = true;
    if (!block->error.empty()) return false;
  }
  return ran;
}

inline std::function<void()> body;

inline void thread_main() {
  body();
  Thread& t = self();
  if (!t.copies.empty()) fail("a thread ends with copies that it did not wait for");
  if (!t.products.empty()) fail("a thread ends with products that it did not wait for");
  t.done = true;
  while (true) switch_fiber(t.fiber, block->scheduler);
}

inline void run_block(Block& b, std::mt19937_64& random) {
  // All bits set is NaN in every floating-point type.
  std::memset(b.shared, 0xff, b.shared_size);
  std::fill(b.watches.begin(), b.watches.end(), Watch{});
  b.barrier = Meeting{};
  std::fill(b.warps.begin(), b.warps.end(), Meeting{});
  std::fill(std::begin(b.named), std::end(b.named), Meeting{});
  b.phase_barriers.clear();
  b.tiles.clear();
  std::vector<Thread*> order;
  for (auto& t : b.threads) {
    t->done = false;
    t->waits_for = nullptr;
    t->clock = Clock{};
    t->copies.clear();
    t->groups = 0;
    t->accumulators.kept.clear();
    t->products.clear();
    t->product_groups = 0;
    t->begun = false;
    t->fiber.start(&thread_main);
    order.push_back(t.get());
  }
  // A copy of TMA ends at some time, at the latest when nobody can go on without it.
  while (true) {
    if (random() % 4 == 0) end_tile(random);
    const bool ran = run_round(order, random);
    if (!b.error.empty()) return;
    if (!ran && !end_tile(random)) break;
  }
  if (!b.tiles.empty()) b.error = "a block ends with copies under way";
  for (const Meeting& barrier : b.named)
    if (barrier.arrived != 0) b.error = "a block ends with a named barrier half full";
  for (Thread* t : order) {
    if (t->done) continue;
    b.current = t;
    b.error = "threads wait for each other for ever (thread " + std::to_string(t->linear) + " of block " +
              std::to_string(b.index.x) + ")";
    return;
  }
}

inline int launch(dim3 grid, dim3 size, size_t shared, std::function<void()> kernel) {
  ++launches;
  const size_t threads = static_cast<size_t>(size.x) * size.y * size.z;
  if (threads == 0 || threads > 1024 || threads % kLanes != 0 || shared > kMostShared || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    last_error = "the launch has sizes that no GPU takes, or a block that is not made of whole warps";
    return 1;
  }
  Block b;
  b.grid = grid;
  b.size = size;
  b.shared_size = (shared + kWatched - 1) / kWatched * kWatched;
  std::vector<unsigned char> memory(b.shared_size + 128);
  b.shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128);
  b.watches.resize(b.shared_size / kWatched);
  b.warps.resize(threads / kLanes);
  for (size_t i = 0; i < threads; ++i) {
    b.threads.push_back(std::make_unique<Thread>());
    b.threads[i]->linear = static_cast<int>(i);
    b.threads[i]->index = dim3(i % size.x, i / size.x % size.y, i / size.x / size.y);
  }
  std::mt19937_64 random(seed);
  block = &b;
  body = std::move(kernel);
  for (unsigned z = 0; z < grid.z && b.error.empty(); ++z)
    for (unsigned y = 0; y < grid.y && b.error.empty(); ++y)
      for (unsigned x = 0; x < grid.x && b.error.empty(); ++x) {
        b.index = dim3(x, y, z);
        run_block(b, random);
      }
  block = nullptr;
  if (b.error.empty()) return 0;
  last_error = b.error;
  return 1;
}

}  // namespace emulator
