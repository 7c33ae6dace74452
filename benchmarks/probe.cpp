// Read bandwidth now: for each line of input one line of output, GB/s of all threads summing a buffer far larger than
// the caches (the best of three passes, some 20 ms).
//
// generate.py compiles it and asks before and after every sample:
// g++ -O3 -march=native -fopenmp probe.cpp -o probe && ./probe THREADS
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

int main(int argc, char** argv) {
  const int threads = argc > 1 ? atoi(argv[1]) : omp_get_max_threads();
  const int64_t n = int64_t{64} << 20;  // floats: 256 MiB
  float* data = static_cast<float*>(aligned_alloc(4096, n * 4));
  volatile float sink = 0;
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < n; ++i) data[i] = 1.0f;
  char line[64];
  while (fgets(line, sizeof line, stdin) != nullptr) {
    double best = 1e9;
    for (int pass = 0; pass < 3; ++pass) {
      const double start = now();
#pragma omp parallel num_threads(threads)
      sink = sink + read_part(data + n / threads * omp_get_thread_num(), n / threads);
      const double seconds = now() - start;
      if (seconds < best) best = seconds;
    }
    printf("%.2f\n", n * 4 / best / 1e9);
    fflush(stdout);
  }
  free(data);
}
