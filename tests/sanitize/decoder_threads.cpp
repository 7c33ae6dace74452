// The decoder (kernels/cpu/decoder.h) under ThreadSanitizer: `make sanitize`, or tools/sanitize.py, compiles and runs
// it.
//
// OpenMP is left out, because GCC's runtime is not built for ThreadSanitizer and gives false alarms: the teams here are
// of std::thread, and each of their threads does what decoder_step has it do. Every step is also taken by one thread
// alone, and both must give the same bits.
//
//   decoder_threads          steps in every weight format, batches on both sides of every limit; then several decoders
//                            at once on the same weights
//   decoder_threads plant    the control: two threads in one workspace, which must be reported
#define FASTGPT_ISA baseline

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../kernels/cpu/decoder.h"
#include "../../kernels/cpu/decoder_pack.h"

namespace fastgpt {
namespace FASTGPT_ISA {
namespace {

constexpr int64_t kLayers = 2, kHeads = 4, kHeadDim = 16, kEmb = kHeads * kHeadDim, kHidden = 4 * kEmb;
constexpr int64_t kVocab = 333, kContext = 24;

struct Weights {
  explicit Weights(WeightFormat format) : random(7) {
    const auto floats = [&](int64_t n) {
      kept_floats.emplace_back(n);
      for (float& x : kept_floats.back()) x = normal(random) * 0.1f;
      return kept_floats.back().data();
    };
    const auto norm = [&] { return DecoderNorm{floats(kEmb), floats(kEmb), 1e-5f}; };
    const auto matrix = [&](int64_t n_out, int64_t n_in, bool bias) {
      DecoderMatrix m = {floats(n_out * n_in), nullptr, bias ? floats(n_out) : nullptr, n_out, n_in, format};
      if (format == WeightFormat::kFloat32) return m;
      const int64_t groups = tiles_of(n_out) * groups_of(n_in);
      kept_bytes.emplace_back(groups * group_bytes(format) + 64);
      kept_scales.emplace_back(groups * kTileRows);
      auto address = reinterpret_cast<uintptr_t>(kept_bytes.back().data());
      auto* data = reinterpret_cast<uint8_t*>((address + 63) / 64 * 64);
      decoder_pack({data, kept_scales.back().data(), static_cast<const float*>(m.data), n_out, n_in, format, 1});
      m.data = data, m.scales = kept_scales.back().data();
      return m;
    };
    for (int64_t i = 0; i < kLayers; ++i)
      layers.push_back({norm(), norm(), matrix(kEmb, kEmb, i == 0), matrix(kEmb, kEmb, i == 0),
                        matrix(kEmb, kEmb, i == 0), matrix(kEmb, kEmb, true), matrix(kHidden, kEmb, true),
                        matrix(kEmb, kHidden, true)});
    model = {};
    model.tok_emb = floats(kVocab * kEmb), model.pos_emb = floats(kContext * kEmb);
    model.layers = layers.data();
    model.final_norm = norm();
    model.head = matrix(kVocab, kEmb, false);
    model.n_layers = kLayers, model.emb_dim = kEmb, model.n_heads = kHeads, model.head_dim = kHeadDim;
    model.hidden_dim = kHidden;
    if (format != WeightFormat::kFloat32) return;
    screen_copy.resize(kVocab * screen_stride(kEmb));
    screen_stats.resize(kVocab * kScreenStats);
    screen_rows({screen_copy.data(), screen_stats.data(), static_cast<const float*>(model.head.data), kVocab, kEmb, 1});
  }

  std::mt19937 random;
  std::normal_distribution<float> normal;
  std::vector<std::vector<float>> kept_floats;
  std::vector<std::vector<uint8_t>> kept_bytes;
  std::vector<std::vector<uint16_t>> kept_scales;
  std::vector<DecoderLayer> layers;
  std::vector<int8_t> screen_copy;
  std::vector<float> screen_stats;
  DecoderModel model;
};

// decoder_step with a team of std::thread.
void step(const DecoderStepArgs& a, bool plant) {
  const DecoderBuffers buffers(a, a.workspace);
  Barrier barrier;
  std::vector<std::thread> threads;
  for (int i = 0; i < a.num_threads; ++i)
    threads.emplace_back([&, i] {
      // The planted race: every thread takes the whole step, in one workspace.
      const Team team{&barrier, plant ? 0 : i, plant ? 1 : a.num_threads};
      DecoderThread{a, *a.model, buffers, team}.run();
    });
  for (std::thread& thread : threads) thread.join();
}

// One decoder: a cache, a workspace, and what it has read.
struct Run {
  Run(const Weights& weights, int64_t batch, CacheFormat cache_format, int threads)
      : weights(weights),
        batch(batch),
        format(cache_format),
        threads(threads),
        cache(kLayers * 2 * batch * kHeads * kContext * kHeadDim) {}

  // Reads `each` tokens of every row; the logits of the last of each row, and the likeliest tokens.
  void read(int64_t each, bool screened, bool plant = false) {
    const int64_t count = batch * each;
    std::vector<int64_t> tokens, rows, positions, wanted;
    for (int64_t row = 0; row < batch; ++row) {
      for (int64_t i = 0; i < each; ++i) {
        tokens.push_back((17 * row + 5 * (position + i) + (best.empty() ? 0 : best[row])) % kVocab);
        rows.push_back(row), positions.push_back(position + i);
      }
      wanted.push_back(static_cast<int64_t>(tokens.size()) - 1);
    }
    logits.assign(batch * kVocab, 0.0f);
    best.assign(batch, -1);
    DecoderStepArgs args = {};
    args.model = &weights.model;
    args.cache = cache.data(), args.cache_format = format;
    args.batch = batch, args.capacity = kContext;
    args.tokens = tokens.data(), args.rows = rows.data(), args.positions = positions.data(), args.count = count;
    args.wanted = wanted.data(), args.n_wanted = batch;
    // Several entries of a row: a prompt, or a guess that is verified.
    args.prompt_keys = each > 1 && position == 0 ? each : 0;
    args.logits = logits.data(), args.best = best.data();
    args.num_threads = threads;
    workspace.assign(decoder_floats(args) + 16, 0.0f);
    const auto address = reinterpret_cast<uintptr_t>(workspace.data());
    args.workspace = workspace.data() + (-address % 64) / sizeof(float);
    int64_t outcome[2] = {-1, 0};
    std::vector<float> room(screen_floats(kEmb, batch, 2, threads) + 16);
    const auto room_address = reinterpret_cast<uintptr_t>(room.data());
    const HeadScreen screen = {weights.screen_copy.data(),
                               weights.screen_stats.data(),
                               2,
                               true,
                               room.data() + (-room_address % 64) / sizeof(float),
                               outcome};
    if (screened && !weights.screen_copy.empty() && batch <= kMostScreened) args.screen = &screen;
    step(args, plant);
    position += each;
  }

  const Weights& weights;
  int64_t batch, position = 0;
  CacheFormat format;
  int threads;
  std::vector<float> cache, workspace, logits;
  std::vector<int64_t> best;
};

// A prompt of three tokens, then single ones, by this many threads and by one: true when all is equal.
bool same(const Weights& weights, int64_t batch, CacheFormat format, int threads, bool screened) {
  Run run(weights, batch, format, threads), alone(weights, batch, format, 1);
  for (int64_t each : {3, 1, 2, 1}) {
    run.read(each, screened);
    alone.read(each, screened);
    const bool equal = memcmp(run.cache.data(), alone.cache.data(), run.cache.size() * sizeof(float)) == 0;
    // The screen may leave other rows with another cut; the likeliest token is the same.
    const bool logits = screened || memcmp(run.logits.data(), alone.logits.data(), run.logits.size() * 4) == 0;
    if (!equal || !logits || run.best != alone.best) return false;
  }
  return true;
}

int check(bool plant) {
  const CacheFormat kinds[] = {CacheFormat::kFloat32, CacheFormat::kBFloat16, CacheFormat::kInt8};
  int failures = 0, steps = 0;
  for (int code = 0; code <= 3; ++code) {
    const Weights weights(static_cast<WeightFormat>(code));
    if (plant) {
      Run(weights, 6, CacheFormat::kFloat32, 2).read(1, false, true);
      return 0;
    }
    const auto one = [&](int64_t batch, CacheFormat format, int threads, bool screened) {
      const bool good = same(weights, batch, format, threads, screened);
      if (!good)
        printf("format %d, batch %lld, %d threads: differs from one thread\n", code, (long long)batch, threads);
      return !good;
    };
    for (int64_t batch : {1, 2, 4, 5, 16})
      for (int threads : {2, 3})
        for (CacheFormat format : kinds) {
          failures += one(batch, format, threads, false), steps += 4;
          if (code == 0) failures += one(batch, format, threads, true), steps += 4;
        }
    std::atomic<int> failed{0};
    std::vector<std::thread> decoders;
    for (int64_t batch : {1, 3, 8})
      decoders.emplace_back([&, batch] { failed += one(batch, kinds[batch % 3], 2, code == 0); });
    for (std::thread& decoder : decoders) decoder.join();
    failures += failed, steps += 12;
  }
  printf("%d steps on several threads, %d cases differ from one thread\n", steps, failures);
  return failures != 0;
}

}  // namespace
}  // namespace FASTGPT_ISA
}  // namespace fastgpt

int main(int argc, char** argv) { return fastgpt::FASTGPT_ISA::check(argc > 1 && strcmp(argv[1], "plant") == 0); }
