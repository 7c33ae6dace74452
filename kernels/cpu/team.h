// Threads that stay together over many short phases: one OpenMP region, with a barrier between two phases that costs
// tenths of a microsecond, not a region of its own for each.
//
// A barrier spins, as the others are microseconds behind; when they are not (another program has the core), it yields.
#pragma once

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#endif

#include "parallel.h"
#include "simd.h"

namespace fastgpt {
namespace FASTGPT_ISA {

struct Barrier {
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> round{0};
};

FASTGPT_INLINE void spin_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

FASTGPT_INLINE void give_way() {
#if defined(__unix__) || defined(__APPLE__)
  sched_yield();
#endif
}

// One thread's view of the team.
struct Team {
  Barrier* barrier;
  int thread, size;

  // Everything that any thread wrote before is seen by all afterwards.
  void wait() const {
    if (size == 1) return;
    const int round = barrier->round.load(std::memory_order_relaxed);
    if (barrier->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      barrier->arrived.store(0, std::memory_order_relaxed);
      barrier->round.store(round + 1, std::memory_order_release);
      return;
    }
    constexpr int kSpins = 4000;
    for (int spins = 0; barrier->round.load(std::memory_order_acquire) == round; ++spins)
      spins < kSpins ? spin_pause() : give_way();
  }

  // This thread's part of 0 .. n, cut at multiples of `unit`.
  int64_t begin(int64_t n, int64_t unit = 1) const { return cut(thread, n, unit); }
  int64_t end(int64_t n, int64_t unit = 1) const { return cut(thread + 1, n, unit); }

 private:
  int64_t cut(int64_t part, int64_t n, int64_t unit) const {
    const int64_t units = (n + unit - 1) / unit;
    return min(n, units * part / size * unit);
  }
};

// Calls body(team) on every thread.
template <class Body>
static inline void run_team(int threads, Body body) {
  Barrier barrier;
#ifdef _OPENMP
  if (threads > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(threads)
    body(Team{&barrier, omp_get_thread_num(), omp_get_num_threads()});
    return;
  }
#endif
  body(Team{&barrier, 0, 1});
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
