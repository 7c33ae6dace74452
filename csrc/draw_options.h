// How tokens are drawn (kernels/cpu/draw.h), checked.
#pragma once

#include <cmath>
#include <vector>

#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {

// inverse_temperature 0 stands for the likeliest token.
inline DrawOptions draw_options(float inverse_temperature, int64_t top_k, double top_p, uint64_t seed, int64_t drawn,
                                int64_t n) {
  require(std::isfinite(inverse_temperature) && inverse_temperature >= 0.0f,
          "draw_tokens: inverse_temperature must be finite, and 0 or more");
  require(top_k >= 0 && top_k <= n,
          "draw_tokens: top_k must be from 0 to " + std::to_string(n) + "; got " + std::to_string(top_k));
  require(top_p > 0.0 && top_p <= 1.0, "draw_tokens: top_p must be above 0, and at most 1");
  require(drawn >= 0, "draw_tokens: drawn must be 0 or more");
  return {inverse_temperature, top_k, top_p, seed, drawn};
}

// Memory for the kernel, kept from call to call.
class DrawRoom {
 public:
  void* of(int64_t count, int64_t n, const DrawOptions& options, int num_threads) {
    check_sizes({count, num_threads, options.top_k + 4}, "draw_tokens");
    check_sizes({num_threads, 4, n}, "draw_tokens");
    const int64_t bytes = kernels().draw_bytes(count, n, options, num_threads);
    if (static_cast<int64_t>(numbers_.size()) * 8 < bytes) numbers_.resize(bytes / 8 + 1);
    return numbers_.data();
  }

 private:
  std::vector<uint64_t> numbers_;
};

}  // namespace fastgpt
