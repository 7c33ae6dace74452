// What a Decoder keeps to screen its head (kernels/cpu/fast_head.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {

// Sums of 8-bit times 16-bit numbers must fit 32 bits, with enough steps for the 16-bit ones.
inline void check_screen_width(int64_t n_in) {
  require(n_in >= 1 && n_in <= 65536, "the screened head takes from 1 to 65536 inputs; got " + std::to_string(n_in));
}

class ScreenState {
 public:
  // A copy of this head, or 0 and 0 for none.
  void set(Address rows, Address stats, const DecoderMatrix& head) {
    require(rows == 0 || head.data != nullptr, "Decoder.set_screen: the head must be set first");
    require(rows == 0 || (head.format == WeightFormat::kFloat32 && head.bias == nullptr),
            "Decoder.set_screen: the head must be float32, without a bias");
    check_screen_width(head.n_in);
    clear();
    if (rows == 0) return;
    screen_.rows = static_cast<const int8_t*>(pointer(rows, head.n_out, 1, "Decoder.set_screen"));
    screen_.stats = float_pointer(stats, head.n_out * kScreenStats, "Decoder.set_screen");
    screen_.outcome = outcome_;
  }

  void clear() {
    screen_ = {};
    rest_ = pause_ = 0;
    counts_.assign(4, 0);
  }

  const std::vector<int64_t>& counts() const { return counts_; }

  // Before a step. top_k: how many of the largest logits are wanted, 0 for all; fill: they are given.
  void use(DecoderStepArgs& args, int64_t top_k, bool fill) {
    const DecoderMatrix& head = args.model->head;
    args.screen = nullptr;
    if (screen_.rows == nullptr || top_k < 1 || top_k >= head.n_out) return;
    if (args.n_wanted < 1 || args.n_wanted > kMostScreened) return;
    if (pause_ > 0) {
      --pause_;
      return;
    }
    screen_.top_k = top_k, screen_.fill = fill;
    const int64_t size = kernels().screen_floats(head.n_in, args.n_wanted, top_k, args.num_threads);
    constexpr int64_t kLine = 16;
    if (static_cast<int64_t>(room_.size()) < size + kLine) room_.resize(size + kLine);
    const auto address = reinterpret_cast<uintptr_t>(room_.data());
    screen_.workspace = room_.data() + (-address % (kLine * sizeof(float))) / sizeof(float);
    outcome_[0] = -1, outcome_[1] = 0;
    args.screen = &screen_;
  }

  // After the step. Where too much is left, the screen is work for nothing: it is tried again after 1, 2, 4, ... 64
  // steps. A copy that is not that of the weights is not tried again.
  void learn(const DecoderStepArgs& args) {
    if (args.screen == nullptr) return;
    const bool stale = outcome_[1] != 0;
    const bool failed = outcome_[0] < 0 || outcome_[0] > args.n_wanted * args.model->head.n_out / 4 || stale;
    counts_[failed ? 2 : 0] += args.n_wanted;
    if (!failed) counts_[1] += outcome_[0];
    if (stale) counts_[3] = 1, screen_ = {};
    rest_ = failed ? std::min<int64_t>(64, std::max<int64_t>(1, 2 * rest_)) : 0;
    pause_ = rest_;
  }

 private:
  HeadScreen screen_{};
  int64_t outcome_[2] = {}, rest_ = 0, pause_ = 0;
  // Screened outputs, rows multiplied for them, outputs for which the full head was needed after all, and whether the
  // head has changed since it was copied.
  std::vector<int64_t> counts_ = std::vector<int64_t>(4, 0);
  std::vector<float> room_;
};

}  // namespace fastgpt
