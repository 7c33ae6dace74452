// What this machine can do at most, measured now: a percentage in a row is a fraction of one of these.
//
//   read   GB/s of all threads summing a buffer far larger than the caches
//   copy   GB/s, reads and writes counted, of the same buffer copied
//   fma    GFLOP/s of independent multiply-adds in registers
//
// Compiled and run by limits.py: g++ -O3 -march=native -fopenmp limits.cpp -o limits && ./limits THREADS
#include <omp.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));

static double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best of several runs: a limit is what the machine can do, not what it does on average.
template <class Body>
static double best_seconds(int runs, Body body) {
  double best = 1e9;
  for (int run = 0; run < runs; ++run) {
    const double start = now();
    body();
    const double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  return best;
}

static float read_part(const float* data, int64_t n) {
  // Eight streams a thread: one alone does not keep enough lines in flight.
  constexpr int kStreams = 8;
  const int64_t part = n / kStreams / kLanes * kLanes;
  Vec sums[kStreams] = {};
  for (int64_t i = 0; i < part; i += kLanes)
    for (int s = 0; s < kStreams; ++s) {
      Vec x;
      memcpy(&x, data + s * part + i, sizeof x);
      sums[s] += x;
    }
  float total = 0;
  for (const Vec& sum : sums)
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

static float multiply_add(int64_t steps) {
  Vec x, y;
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = 0.999f, y[lane] = 1e-3f;
  // Ten different starts: the compiler computes equal sums once, and the loop then waits for one chain of additions.
  Vec a0 = y, a1 = y * 2, a2 = y * 3, a3 = y * 4, a4 = y * 5, a5 = y * 6, a6 = y * 7, a7 = y * 8, a8 = y * 9,
      a9 = y * 10;
  for (int64_t i = 0; i < steps; ++i) {
    a0 = a0 * x + y, a1 = a1 * x + y, a2 = a2 * x + y, a3 = a3 * x + y, a4 = a4 * x + y;
    a5 = a5 * x + y, a6 = a6 * x + y, a7 = a7 * x + y, a8 = a8 * x + y, a9 = a9 * x + y;
  }
  const Vec sum = ((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7)) + (a8 + a9);
  return sum[0];
}

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : omp_get_max_threads();
  const int64_t n = int64_t{256} << 20;  // floats: 1 GiB
  float* data = static_cast<float*>(aligned_alloc(4096, n * 4));
  volatile float sink = 0;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; ++i) data[i] = 1.0f;

  const double read = best_seconds(6, [&] {
#pragma omp parallel num_threads(threads)
    sink = sink + read_part(data + n / threads * omp_get_thread_num(), n / threads);
  });
  const double copy = best_seconds(6, [&] {
#pragma omp parallel num_threads(threads)
    {
      const int64_t part = n / 2 / threads, begin = part * omp_get_thread_num();
      memcpy(data + n / 2 + begin, data + begin, part * 4);
    }
  });
  const int64_t steps = 20000000;
  const double fma = best_seconds(3, [&] {
#pragma omp parallel num_threads(threads)
    sink = sink + multiply_add(steps);
  });
  printf("{\"threads\": %d, \"read_gbs\": %.1f, \"copy_gbs\": %.1f, \"fma_gflops\": %.1f}\n", threads,
         n * 4 / read / 1e9, n * 4 / copy / 1e9, steps * 10.0 * 2 * kLanes * threads / fma / 1e9);
  free(data);
}
