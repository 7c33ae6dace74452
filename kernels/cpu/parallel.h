// Work over threads: OpenMP, so that the pool is the one that PyTorch already runs.
//
// A region runs on 1 thread or on all of them: a team of another size would make the OpenMP runtime tear its pool down.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifndef FASTGPT_ISA
#error "define FASTGPT_ISA, the namespace of the instruction set"
#endif

namespace fastgpt {
namespace FASTGPT_ISA {

// Threads for n items of which a thread should have at least `grain`: 1 or num_threads.
static inline int threads_for(int64_t n, int64_t grain, int num_threads) {
#ifdef _OPENMP
  return num_threads > 1 && n > grain && !omp_in_parallel() ? num_threads : 1;
#else
  return 1;
#endif
}

// Calls body(begin, end, thread) on `threads` threads (from threads_for), each with one contiguous part of 0 .. n.
template <class Body>
static inline void parallel_ranges(int64_t n, int threads, Body body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      // The runtime may give fewer threads than asked for.
      const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
      const int64_t begin = n * thread / team, end = n * (thread + 1) / team;
      if (begin < end) body(begin, end, static_cast<int>(thread));
    }
    return;
  }
#endif
  if (n > 0) body(static_cast<int64_t>(0), n, 0);
}

// Calls body(item, thread) for every item, handed out one at a time: for items of unequal cost, the costly ones first.
template <class Body>
static inline void parallel_items(int64_t n, int threads, Body body) {
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t item = 0; item < n; ++item) body(item, thread);
    }
    return;
  }
#endif
  for (int64_t item = 0; item < n; ++item) body(item, 0);
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
