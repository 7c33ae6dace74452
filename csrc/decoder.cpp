// fastgpt._cpu.Decoder: bindings of kernels/cpu/decoder.h. It keeps the addresses of a model's weights, which its owner
// keeps alive (fastgpt/generation/native_weights.py), and a workspace, so that a step allocates nothing.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"
#include "draw_options.h"
#include "head_screen.h"

namespace fastgpt {
namespace {

constexpr const char* kWhat = "Decoder";
constexpr int64_t kNormsPerLayer = 2, kMatricesPerLayer = 6;
constexpr int64_t kCacheAlignment[] = {4, 2, 1};  // of each CacheFormat

// The OpenMP runtime's threads do not survive a fork, and a region in the child would wait for them for ever.
bool forked = false;

int usable_threads(int num_threads) { return forked ? 1 : check_threads(num_threads); }

WeightFormat to_format(int code) {
  require(code >= 0 && code <= 3, "Decoder: unknown weight format " + std::to_string(code));
  return static_cast<WeightFormat>(code);
}

// Of a packed matrix.
struct PackedSize {
  int64_t bytes, scales;
};

PackedSize packed_size(int64_t n_out, int64_t n_in, WeightFormat format) {
  require(format != WeightFormat::kFloat32, "Decoder: float32 weights are not packed");
  check_sizes({n_out, n_in}, "Decoder weights");
  require(n_out >= 1 && n_in >= 1 && n_out <= INT64_MAX / 1024 && n_in <= INT64_MAX / 1024,
          "Decoder weights: sizes must be at least 1");
  const int64_t rows = (n_out + kTileRows - 1) / kTileRows * kTileRows;
  const int64_t groups = (n_in + kScaleGroup - 1) / kScaleGroup;
  check_sizes({rows, groups, kScaleGroup}, "Decoder weights");
  const int64_t weights = rows * groups * kScaleGroup;
  if (format == WeightFormat::kBFloat16) return {2 * weights, 0};
  return {format == WeightFormat::kInt8 ? weights : weights / 2, rows * groups};
}

// Bytes and scales that `pack` writes.
pybind11::tuple size_of_packed(int64_t n_out, int64_t n_in, int format) {
  const PackedSize size = packed_size(n_out, n_in, to_format(format));
  return pybind11::make_tuple(size.bytes, size.scales);
}

void pack(Address data, Address scales, Address weight, int64_t n_out, int64_t n_in, int format, int num_threads) {
  const char* what = "Decoder weights";
  const PackedSize size = packed_size(n_out, n_in, to_format(format));
  const DecoderPackArgs args = {static_cast<uint8_t*>(pointer(data, size.bytes, 1, what)),
                                static_cast<uint16_t*>(pointer(scales, size.scales, sizeof(uint16_t), what)),
                                float_pointer(weight, n_out * n_in, what),
                                n_out,
                                n_in,
                                to_format(format),
                                usable_threads(num_threads)};
  pybind11::gil_scoped_release release;
  kernels().decoder_pack(args);
}

CacheFormat to_cache_format(int code) {
  require(code >= 0 && code <= 2, "Decoder: unknown cache format " + std::to_string(code));
  return static_cast<CacheFormat>(code);
}

struct Entries {
  std::vector<int64_t> tokens, rows, positions, best, wanted;
};

class Decoder {
 public:
  Decoder(int64_t n_layers, int64_t emb_dim, int64_t n_heads, int64_t head_dim, int64_t hidden_dim, int64_t vocab_size,
          int64_t context_length, int64_t n_logits)
      : vocab_size_(vocab_size), context_length_(context_length) {
    for (int64_t size : {n_layers, emb_dim, n_heads, head_dim, hidden_dim, vocab_size, context_length, n_logits})
      require(size >= 1 && size <= (int64_t{1} << 31),
              "Decoder: every size must be from 1 to 2^31; got " + std::to_string(size));
    require(head_dim <= kMaxHeadDim, "Decoder: head_dim must be from 1 to 256; got " + std::to_string(head_dim));
    check_sizes({n_layers, 2, n_heads, head_dim, context_length}, kWhat);
    check_sizes({std::max({vocab_size, context_length, hidden_dim, n_heads * head_dim, n_logits}), emb_dim}, kWhat);
    require(n_layers <= 4096, "Decoder: at most 4096 layers; got " + std::to_string(n_layers));
    const int64_t heads = n_heads * head_dim;
    layers_.resize(n_layers);
    for (DecoderLayer& layer : layers_) {
      layer = {};
      for (DecoderMatrix* matrix : {&layer.query, &layer.key, &layer.value})
        matrix->n_out = heads, matrix->n_in = emb_dim;
      layer.project.n_out = emb_dim, layer.project.n_in = heads;
      layer.widen.n_out = hidden_dim, layer.widen.n_in = emb_dim;
      layer.narrow.n_out = emb_dim, layer.narrow.n_in = hidden_dim;
    }
    model_ = {};
    model_.layers = layers_.data();
    model_.head.n_out = n_logits, model_.head.n_in = emb_dim;
    model_.n_layers = n_layers, model_.emb_dim = emb_dim, model_.n_heads = n_heads, model_.head_dim = head_dim;
    model_.hidden_dim = hidden_dim;
  }

  void set_embeddings(Address tok_emb, Address pos_emb) {
    const std::unique_lock<std::mutex> lock = claim();
    model_.tok_emb = float_pointer(tok_emb, vocab_size_ * model_.emb_dim, kWhat);
    model_.pos_emb = float_pointer(pos_emb, context_length_ * model_.emb_dim, kWhat);
  }

  // Norms 2 i and 2 i + 1 are those of layer i; the last is the final one.
  void set_norm(int64_t index, Address weight, Address bias, float eps) {
    const std::unique_lock<std::mutex> lock = claim();
    const int64_t count = kNormsPerLayer * model_.n_layers + 1;
    require(index >= 0 && index < count,
            "Decoder: there are " + std::to_string(count) + " norms; got index " + std::to_string(index));
    DecoderLayer* layer = index + 1 == count ? nullptr : &layers_[index / kNormsPerLayer];
    DecoderNorm& norm = layer == nullptr ? model_.final_norm : index % 2 == 0 ? layer->norm1 : layer->norm2;
    norm = {float_pointer(weight, model_.emb_dim, kWhat), float_pointer(bias, model_.emb_dim, kWhat), eps};
  }

  // Matrices 6 i to 6 i + 5 are query, key, value, project, widen, narrow of layer i; the last is the head.
  void set_matrix(int64_t index, int format, Address data, Address scales, Address bias) {
    const std::unique_lock<std::mutex> lock = claim();
    const int64_t count = kMatricesPerLayer * model_.n_layers + 1;
    require(index >= 0 && index < count,
            "Decoder: there are " + std::to_string(count) + " matrices; got index " + std::to_string(index));
    if (index + 1 == count) screen_.clear();
    DecoderMatrix& matrix =
        index + 1 == count ? model_.head : matrix_of(layers_[index / kMatricesPerLayer], index % kMatricesPerLayer);
    DecoderMatrix changed = matrix;
    changed.format = to_format(format);
    if (changed.format == WeightFormat::kFloat32) {
      changed.data = float_pointer(data, matrix.n_out * matrix.n_in, kWhat);
    } else {
      const PackedSize size = packed_size(matrix.n_out, matrix.n_in, changed.format);
      changed.data = pointer(data, size.bytes, 1, kWhat);
      changed.scales = static_cast<const uint16_t*>(pointer(scales, size.scales, sizeof(uint16_t), kWhat));
    }
    changed.bias = bias == 0 ? nullptr : float_pointer(bias, matrix.n_out, kWhat);
    matrix = changed;
  }

  // A copy of the float32 head from screen_rows, or 0 and 0 for none. Steps then multiply only what the copy leaves.
  void set_screen(Address rows, Address stats) {
    const std::unique_lock<std::mutex> lock = claim();
    screen_.set(rows, stats, model_.head);
  }

  std::vector<int64_t> screen_counts() const { return screen_.counts(); }

  // One step, see DecoderStepArgs. entries: (3, count) int64: tokens, rows, positions. wanted: (n_wanted) int64.
  // prompt: the entries are pieces of prompts. top_k: 0 for all logits; else those that are not among the top_k largest
  // may be -inf.
  void step(Address cache, int cache_format, int64_t batch, int64_t capacity, Address entries, int64_t count,
            Address wanted, int64_t n_wanted, Address logits, Address best, int num_threads, int64_t top_k,
            bool prompt) {
    const std::unique_lock<std::mutex> lock = claim();
    check_complete();
    DecoderStepArgs args = cache_args(cache, cache_format, batch, capacity, num_threads);
    read_entries(entries, count);
    check_entries(batch, capacity, 1);
    require(n_wanted >= 0 && n_wanted <= count, "Decoder.step: n_wanted must be from 0 to the number of entries");
    const auto* list = static_cast<const int64_t*>(pointer(wanted, n_wanted, sizeof(int64_t), kWhat));
    entries_.wanted.assign(list, list + n_wanted);
    for (int64_t index : entries_.wanted)
      require(index >= 0 && index < count, "Decoder.step: wanted holds " + std::to_string(index) + ", but there are " +
                                               std::to_string(count) + " entries");
    args.n_wanted = n_wanted;
    if (prompt) args.prompt_keys = longest();
    args.logits = logits == 0 ? nullptr : float_pointer(logits, n_wanted * model_.head.n_out, kWhat);
    args.best = static_cast<int64_t*>(best == 0 ? nullptr : pointer(best, n_wanted, sizeof(int64_t), kWhat));
    require(top_k >= 0 && top_k <= kMostTop, "Decoder.step: top_k must be from 0 to " + std::to_string(kMostTop));
    pybind11::gil_scoped_release release;
    run(args, args.logits == nullptr ? 1 : top_k, args.logits != nullptr);
  }

  // The next tokens, one row an entry, for up to `steps` steps, into out (steps, count): the likeliest where
  // inverse_temperature is 0, else drawn, see DrawOptions. A row that gives eos_id ends: it is left out from then on,
  // and its places hold eos_id. Returns the number of steps, fewer when all rows have ended.
  int64_t generate(Address cache, int cache_format, int64_t batch, int64_t capacity, Address entries, int64_t count,
                   int64_t steps, int64_t eos_id, Address out, int num_threads, float inverse_temperature,
                   int64_t top_k, double top_p, uint64_t seed, int64_t drawn) {
    const std::unique_lock<std::mutex> lock = claim();
    check_complete();
    DecoderStepArgs args = cache_args(cache, cache_format, batch, capacity, num_threads);
    read_entries(entries, count);
    require(steps >= 0, "Decoder.generate: steps must be 0 or more");
    require(model_.head.n_out <= vocab_size_, "Decoder.generate: the head gives more tokens than can be read");
    check_sizes({steps, count}, kWhat);
    const DrawOptions options = draw_options(inverse_temperature, top_k, top_p, seed, drawn, model_.head.n_out);
    if (steps == 0 || count == 0) return 0;
    check_entries(batch, capacity, steps);
    auto* tokens_out = static_cast<int64_t*>(pointer(out, steps * count, sizeof(int64_t), kWhat));
    pybind11::gil_scoped_release release;
    return next_steps(args, count, steps, eos_id, tokens_out, options);
  }

 private:
  static DecoderMatrix& matrix_of(DecoderLayer& layer, int64_t which) {
    DecoderMatrix* const all[kMatricesPerLayer] = {&layer.query,   &layer.key,   &layer.value,
                                                   &layer.project, &layer.widen, &layer.narrow};
    return *all[which];
  }

  // Two threads in one Decoder would share its workspace.
  std::unique_lock<std::mutex> claim() {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock())
      throw std::runtime_error("this Decoder is at work in another thread; make one for each thread");
    return lock;
  }

  void check_complete() const {
    bool complete = model_.tok_emb != nullptr && model_.final_norm.weight != nullptr && model_.head.data != nullptr;
    for (const DecoderLayer& layer : layers_) {
      complete = complete && layer.norm1.weight != nullptr && layer.norm2.weight != nullptr;
      for (const DecoderMatrix* m :
           {&layer.query, &layer.key, &layer.value, &layer.project, &layer.widen, &layer.narrow})
        complete = complete && m->data != nullptr;
    }
    for (const DecoderLayer& layer : layers_)
      require(layer.query.format == layer.key.format && layer.query.format == layer.value.format,
              "Decoder: query, key and value of a layer must have one weight format");
    require(complete, "Decoder: set_embeddings, set_norm and set_matrix must be called for all weights first");
  }

  DecoderStepArgs cache_args(Address cache, int cache_format, int64_t batch, int64_t capacity, int num_threads) const {
    check_sizes({model_.n_layers, 2, batch, model_.n_heads, capacity, model_.head_dim + kCacheScaleBytes}, kWhat);
    DecoderStepArgs args{};
    args.model = &model_;
    args.cache_format = to_cache_format(cache_format);
    const int64_t alignment = kCacheAlignment[cache_format];
    args.cache = pointer(cache, batch * capacity, alignment, kWhat);
    args.batch = batch, args.capacity = capacity;
    args.num_threads = usable_threads(num_threads);
    return args;
  }

  void read_entries(Address address, int64_t count) {
    check_sizes({3, count}, kWhat);
    // The step's buffers: so many floats for each entry.
    check_sizes(
        {count, model_.emb_dim + model_.hidden_dim + 4 * model_.n_heads * model_.head_dim + model_.head.n_out, 4096},
        kWhat);
    const auto* entries = static_cast<const int64_t*>(pointer(address, 3 * count, sizeof(int64_t), kWhat));
    entries_.tokens.assign(entries, entries + count);
    entries_.rows.assign(entries + count, entries + 2 * count);
    entries_.positions.assign(entries + 2 * count, entries + 3 * count);
  }

  // Copies are checked, so that nobody can change them afterwards. steps: how many positions each entry will need.
  void check_entries(int64_t batch, int64_t capacity, int64_t steps) const {
    const int64_t limit = std::min(capacity, context_length_);
    for (size_t i = 0; i < entries_.tokens.size(); ++i) {
      const std::string where = "Decoder: entry " + std::to_string(i) + ": ";
      require(entries_.tokens[i] >= 0 && entries_.tokens[i] < vocab_size_,
              where + "token " + std::to_string(entries_.tokens[i]) + " is outside the vocabulary of " +
                  std::to_string(vocab_size_));
      require(entries_.rows[i] >= 0 && entries_.rows[i] < batch,
              where + "row " + std::to_string(entries_.rows[i]) + " is outside the batch of " + std::to_string(batch));
      require(entries_.positions[i] >= 0 && entries_.positions[i] < limit && steps <= limit - entries_.positions[i],
              where + "position " + std::to_string(entries_.positions[i]) + " and " + std::to_string(steps) +
                  " steps do not fit the cache of " + std::to_string(capacity) + " and the context of " +
                  std::to_string(context_length_));
    }
  }

  // Keys of the longest row; a thread copies those of one head.
  int64_t longest() const {
    int64_t keys = 0;
    for (int64_t position : entries_.positions) keys = std::max(keys, position + 1);
    check_sizes({keys, kMaxHeadDim, 4 * 4096}, kWhat);
    return keys;
  }

  // top_k: how many of the largest logits are wanted, 0 for all; fill: the others must be -inf, not anything.
  void run(DecoderStepArgs& args, int64_t top_k, bool fill) {
    args.tokens = entries_.tokens.data();
    args.rows = entries_.rows.data();
    args.positions = entries_.positions.data();
    args.count = static_cast<int64_t>(entries_.tokens.size());
    args.wanted = entries_.wanted.data();
    if (args.count == 0) return;
    if (args.logits == nullptr) args.logits = room(logits_, logits_size_, args.n_wanted * model_.head.n_out);
    args.workspace = room(workspace_, workspace_size_, kernels().decoder_floats(args));
    screen_.use(args, top_k, fill);
    kernels().decoder_step(args);
    screen_.learn(args);
  }

  // A buffer of at least `size` numbers at the beginning of a cache line, kept from call to call.
  static float* room(std::unique_ptr<float[]>& buffer, int64_t& have, int64_t size) {
    constexpr int64_t kLine = 16;
    if (have < size) {
      have = 0;
      buffer.reset(new float[size + kLine]);
      have = size;
    }
    const auto address = reinterpret_cast<uintptr_t>(buffer.get());
    return buffer.get() + (-address % (kLine * sizeof(float))) / sizeof(float);
  }

  int64_t next_steps(DecoderStepArgs& args, int64_t count, int64_t steps, int64_t eos_id, int64_t* out,
                     const DrawOptions& options) {
    std::vector<int64_t> places(count);  // of the entries in a row of out
    for (int64_t i = 0; i < count; ++i) places[i] = i;
    entries_.best.resize(count);
    const bool greedy = options.inverse_temperature == 0.0f;
    const int64_t top_k = greedy ? 1 : options.top_k > kMostTop ? 0 : options.top_k;
    DrawArgs draw{};
    draw.options = options;
    draw.n = model_.head.n_out;
    draw.tokens = entries_.best.data();
    if (!greedy) draw.workspace = draw_room_.of(count, draw.n, options, args.num_threads);
    for (int64_t step = 0; step < steps; ++step, out += count) {
      const int64_t active = static_cast<int64_t>(places.size());
      entries_.wanted.resize(active);
      for (int64_t i = 0; i < active; ++i) entries_.wanted[i] = i;
      args.n_wanted = active;
      args.logits = room(logits_, logits_size_, active * draw.n);
      args.best = greedy ? entries_.best.data() : nullptr;
      args.draw = greedy ? nullptr : &draw;
      draw.logits = args.logits, draw.rows = entries_.rows.data(), draw.count = active;
      run(args, top_k, !greedy);
      ++draw.options.drawn;
      std::fill(out, out + count, eos_id);
      int64_t kept = 0;
      for (int64_t i = 0; i < active; ++i) {
        out[places[i]] = entries_.best[i];
        if (entries_.best[i] == eos_id) continue;
        places[kept] = places[i];
        entries_.tokens[kept] = entries_.best[i];
        entries_.rows[kept] = entries_.rows[i];
        entries_.positions[kept++] = entries_.positions[i] + 1;
      }
      for (std::vector<int64_t>* list : {&places, &entries_.tokens, &entries_.rows, &entries_.positions})
        list->resize(kept);
      if (kept == 0) return step + 1;
    }
    return steps;
  }

  std::mutex mutex_;
  DecoderModel model_;
  std::vector<DecoderLayer> layers_;
  int64_t vocab_size_, context_length_;
  Entries entries_;
  std::unique_ptr<float[]> workspace_, logits_;
  int64_t workspace_size_ = 0, logits_size_ = 0;
  ScreenState screen_;
  DrawRoom draw_room_;
};

}  // namespace

void bind_decoder(pybind11::module_& module) {
  namespace py = pybind11;
#if defined(__unix__) || defined(__APPLE__)
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif
  module.def("decoder_packed_size", &size_of_packed);
  module.def("decoder_pack", &pack);
  pybind11::class_<Decoder>(module, "Decoder", pybind11::module_local())
      .def(pybind11::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>())
      .def("set_embeddings", &Decoder::set_embeddings)
      .def("set_norm", &Decoder::set_norm)
      .def("set_matrix", &Decoder::set_matrix)
      .def("set_screen", &Decoder::set_screen)
      .def("screen_counts", &Decoder::screen_counts)
      .def("step", &Decoder::step, py::arg("cache"), py::arg("cache_format"), py::arg("batch"), py::arg("capacity"),
           py::arg("entries"), py::arg("count"), py::arg("wanted"), py::arg("n_wanted"), py::arg("logits"),
           py::arg("best"), py::arg("num_threads"), py::arg("top_k") = 0, py::arg("prompt") = false)
      .def("generate", &Decoder::generate);
}

}  // namespace fastgpt
