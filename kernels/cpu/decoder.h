// One step of a GPT of the book with a key-value cache: from tokens to logits, all layers in one call.
//
//   x = tok_emb[token] + pos_emb[position]
//   for each layer:   q, k, v = Wq n, Wk n, Wv n with n = norm1(x);  cache[position] = k, v
//                     x += Wo attention(q, keys and values of 0 .. position)
//                     x += W2 gelu(W1 norm2(x))
//   logits = Wh final_norm(x), best = argmax(logits), or a token drawn from them (draw.h)
//
// A step reads `count` entries, each a (row, position, token): one new token of each row, several of one row (a piece
// of a prompt, a guess to be verified), or both. An entry sees the entries of its row that come before it in the same
// step.
//
// Work: one OpenMP region for the whole step (team.h). In each phase a thread has its own output rows of the matrix, so
// that it reads one contiguous part of the weights, each once. Four phases a layer, a barrier after each:
//
//   attend   norm1, the query, key and value rows of the thread's heads, and attention of these heads
//   project  Wo and the shortcut
//   widen    norm2, W1, GELU
//   narrow   W2 and the shortcut
//
// Of prompts a step goes on behind the last layer's keys and values with the wanted entries alone, and attention of the
// other layers works on tiles (decoder_prompt.h). A norm of few entries is computed by every thread for itself: it
// costs less than a barrier. Everything is added in float32, and no sum depends on the number of threads or on the
// other entries. Bytes: every weight once, every cached key and value of the rows once an entry, little else.
#pragma once

#include <cmath>
#include <limits>

#include "decode_attention.h"
#include "decoder_args.h"
#include "decoder_blocks.h"
#include "decoder_prompt.h"
#include "decoder_rows.h"
#include "decoder_tiles.h"
#include "draw.h"
#include "fast_head.h"
#include "gelu.h"
#include "small_gemm.h"
#include "team.h"

namespace fastgpt {
namespace FASTGPT_ISA {

// Up to here every thread normalises and packs all entries for itself.
constexpr int64_t kAlone = 4;

// Places in the workspace. Each part begins at a cache line.
struct DecoderBuffers {
  float *x, *q, *k, *v, *attended, *hidden, *normed, *packed, *scratch;
  int64_t* bests;
  int64_t floats, normed_floats, packed_floats;  // the last two: one thread's part, or all of it when it is shared
  int64_t scratch_floats;                        // one thread's part

  explicit DecoderBuffers(const DecoderStepArgs& a, float* base) {
    const DecoderModel& model = *a.model;
    const int64_t count = a.count, threads = a.num_threads;
    int64_t used = 0;
    const auto take = [&](int64_t n) {
      float* place = base == nullptr ? nullptr : base + used;
      used += round_up(n, 16);
      return place;
    };
    const int64_t heads = model.n_heads * model.head_dim;
    x = take(count * model.emb_dim);
    q = take(count * heads);
    k = take(count * heads);
    v = take(count * heads);
    attended = take(count * heads);
    hidden = take(count * model.hidden_dim);
    const int64_t copies = count <= kAlone ? threads : 1;
    const int64_t widest = max(max(model.emb_dim, model.hidden_dim), heads);
    normed_floats = round_up(count * model.emb_dim, 16);
    packed_floats = PackedInputs::floats(widest, count);
    normed = take(copies * normed_floats);
    packed = take(copies * packed_floats);
    scratch_floats = round_up(BlockScratch::floats(count), 16);
    if (a.prompt_keys > 0) scratch_floats = max(scratch_floats, prompt_workspace(model, a.prompt_keys, nullptr).floats);
    scratch = take(threads * scratch_floats);
    bests = reinterpret_cast<int64_t*>(take(count * threads * 2));
    floats = used;
  }
};

static int64_t decoder_floats(const DecoderStepArgs& a) { return DecoderBuffers(a, nullptr).floats; }

FASTGPT_INLINE void norm_row(float* out, const float* x, const DecoderNorm& norm, int64_t n) {
  const float mean = sum_lanes(n, [&](int64_t i, int64_t c) { return load_lanes(x + i, c); }) / n;
  const float var = sum_lanes(n,
                              [&](int64_t i, int64_t c) {
                                const VecF centred = load_lanes(x + i, c) - mean;
                                return centred * centred;
                              }) /
                    n;
  const float rstd = 1.0f / std::sqrt(var + norm.eps);
  for_lanes(n, [&](int64_t i, int64_t c) {
    const VecF normalised = (load_lanes(x + i, c) - mean) * rstd;
    store_lanes(out + i, normalised * load_lanes(norm.weight + i, c) + load_lanes(norm.bias + i, c), c);
  });
}

// What one thread does of one step.
struct DecoderThread {
  const DecoderStepArgs& a;
  const DecoderModel& model;
  const DecoderBuffers& buffers;
  const Team& team;
  // The entries that are still followed: all, or the wanted ones, which then lie side by side.
  int64_t count = a.count;

  int64_t heads_width() const { return model.n_heads * model.head_dim; }

  void embed() const {
    const int64_t n = model.emb_dim;
    for (int64_t m = team.begin(a.count); m < team.end(a.count); ++m) {
      const float *token = model.tok_emb + a.tokens[m] * n, *position = model.pos_emb + a.positions[m] * n;
      for_lanes(n, [&](int64_t i, int64_t c) {
        store_lanes(buffers.x + m * n + i, load_lanes(token + i, c) + load_lanes(position + i, c), c);
      });
    }
  }

  // The normalised entries: this thread's own, or, when there are many, shared ones.
  const float* normalise(const DecoderNorm& norm, const int64_t* wanted, int64_t count) const {
    const int64_t n = model.emb_dim;
    const bool alone = a.count <= kAlone;
    float* out = buffers.normed + (alone ? team.thread * buffers.normed_floats : 0);
    const int64_t begin = alone ? 0 : team.begin(count), end = alone ? count : team.end(count);
    for (int64_t m = begin; m < end; ++m)
      norm_row(out + m * n, buffers.x + (wanted == nullptr ? m : wanted[m]) * n, norm, n);
    if (!alone) team.wait();
    return out;
  }

  // x as a matrix reads it: at most one of the three ways.
  struct Inputs {
    const float* x;
    int64_t count;
    PackedInputs tiles;
    BlockInputs block;
    bool in_block;
  };

  Inputs pack(const DecoderMatrix& matrix, const float* x, int64_t count) const {
    const int64_t n_in = matrix.n_in;
    const bool alone = a.count <= kAlone;
    float* place = buffers.packed + (alone ? team.thread * buffers.packed_floats : 0);
    const Inputs inputs = {x, count, PackedInputs::at(place, n_in, count), BlockInputs{place, n_in, count},
                           matrix.format == WeightFormat::kBFloat16 && count >= kBlockEntries};
    if (matrix.format == WeightFormat::kFloat32) return inputs;
    const int64_t parts = inputs.in_block ? inputs.block.panels() : groups_of(n_in);
    const int64_t begin = alone ? 0 : team.begin(parts), end = alone ? parts : team.end(parts);
    inputs.in_block ? pack_block(inputs.block, x, begin, end)
                    : pack_inputs(inputs.tiles, matrix.format, x, n_in, count, begin, end);
    if (!alone) team.wait();
    return inputs;
  }

  // y (count, n_out) (+)= x W^T + bias, rows begin .. end of W.
  void multiply(float* y, const DecoderMatrix& matrix, const Inputs& inputs, int64_t begin, int64_t end,
                bool add = false) const {
    const Output out = {y, matrix.n_out, matrix.bias, add};
    if (inputs.in_block)
      return multiply_block(out, matrix, inputs.block,
                            BlockScratch::at(buffers.scratch + team.thread * buffers.scratch_floats), begin, end);
    matrix.format == WeightFormat::kFloat32
        ? multiply_float_rows(out, matrix, inputs.x, matrix.n_in, inputs.count, begin, end)
        : multiply_tiles(out, matrix, inputs.tiles, inputs.count, begin, end);
  }

  // This thread's part of the rows.
  void multiply_part(float* y, const DecoderMatrix& matrix, const float* x, int64_t count, bool add = false) const {
    const Inputs inputs = pack(matrix, x, count);
    multiply(y, matrix, inputs, team.begin(matrix.n_out, kTileRows), team.end(matrix.n_out, kTileRows), add);
  }

  void attend(const DecoderLayer& layer, int64_t number) const {
    const float* x = normalise(layer.norm1, nullptr, a.count);
    const int64_t first = team.begin(model.n_heads), last = team.end(model.n_heads);
    // Where the heads divide evenly, a thread attends with its own rows, and no barrier is needed in between.
    const bool whole = layer.query.format == WeightFormat::kFloat32 || model.head_dim % kTileRows == 0;
    const bool even = team.size == 1 || (whole && (model.n_heads % team.size == 0 || model.n_heads >= 8 * team.size));
    const int64_t width = heads_width();
    const int64_t begin = even ? first * model.head_dim : team.begin(width, kTileRows);
    const int64_t end = even ? last * model.head_dim : team.end(width, kTileRows);
    const Inputs inputs = pack(layer.query, x, a.count);
    multiply(buffers.q, layer.query, inputs, begin, end);
    multiply(buffers.k, layer.key, inputs, begin, end);
    multiply(buffers.v, layer.value, inputs, begin, end);
    if (!even) team.wait();
    if (a.cache_format == CacheFormat::kFloat32) attend_cached<float>(number, first, last);
    if (a.cache_format == CacheFormat::kBFloat16) attend_cached<Bf16>(number, first, last);
    if (a.cache_format == CacheFormat::kInt8) attend_cached<int8_t>(number, first, last);
  }

  // Behind it nothing needs the entries that are not wanted.
  bool ends_prompt(int64_t layer) const { return a.prompt_keys > 0 && layer + 1 == model.n_layers; }

  template <class T>
  void attend_cached(int64_t layer, int64_t first, int64_t last) const {
    write_cache<T>(layer, first, last);
    if (ends_prompt(layer)) return attend_heads<T>(layer, first, last, a.wanted, a.n_wanted);
    a.prompt_keys > 0 ? attend_prompts<T>(layer, first, last) : attend_heads<T>(layer, first, last, nullptr, a.count);
  }

  template <class T>
  void attend_prompts(int64_t layer, int64_t first, int64_t last) const {
    float* place = buffers.scratch + team.thread * buffers.scratch_floats;
    const AttentionForwardWorkspace<float> workspace = prompt_workspace(model, a.prompt_keys, place);
    for (int64_t head = first; head < last; ++head)
      for_runs(a, [&](int64_t entry, int64_t entries) {
        const int64_t from = entry * heads_width() + head * model.head_dim;
        const int64_t first_key = place_of<T>(a.rows[entry], head, 0);
        attend_run(workspace, buffers.attended + from, buffers.q + from, cached<T>(layer, 0) + first_key,
                   cached<T>(layer, 1) + first_key, entries, a.positions[entry] + entries, model.head_dim,
                   heads_width());
      });
  }

  // Keys (which = 0) or values (1) of a layer.
  template <class T>
  T* cached(int64_t layer, int64_t which) const {
    return static_cast<T*>(a.cache) + (layer * 2 + which) * place_of<T>(a.batch, 0, 0);
  }

  template <class T>
  int64_t place_of(int64_t row, int64_t head, int64_t position) const {
    return ((row * model.n_heads + head) * a.capacity + position) * cache_stride<T>(model.head_dim);
  }

  template <class T>
  void write_cache(int64_t layer, int64_t first, int64_t last) const {
    T *keys = cached<T>(layer, 0), *values = cached<T>(layer, 1);
    for (int64_t m = 0; m < a.count; ++m)
      for (int64_t head = first; head < last; ++head) {
        const int64_t from = m * heads_width() + head * model.head_dim;
        const int64_t to = place_of<T>(a.rows[m], head, a.positions[m]);
        write_cached(keys + to, buffers.k + from);
        write_cached(values + to, buffers.v + from);
      }
  }

  template <class T>
  void write_cached(T* to, const float* from) const {
    if constexpr (std::is_same_v<T, int8_t>) {
      const float scale = quantise(to, from, model.head_dim).scale;
      memcpy(to + model.head_dim, &scale, sizeof scale);
    } else {
      for_lanes(model.head_dim, [&](int64_t i, int64_t c) { store_lanes(to + i, load_lanes(from + i, c), c); });
    }
  }

  // Of `entries` entries, all or those of a list, into one row of `attended` after the other.
  template <class T>
  void attend_heads(int64_t layer, int64_t first, int64_t last, const int64_t* list, int64_t entries) const {
    DecodeAttentionArgs args{};
    args.k = cached<T>(layer, 0);
    args.v = cached<T>(layer, 1);
    args.head_dim = model.head_dim;
    args.n_heads = model.n_heads;
    args.q_strides[1] = model.head_dim;
    args.k_strides[0] = args.v_strides[0] = place_of<T>(1, 0, 0);
    args.k_strides[1] = args.v_strides[1] = place_of<T>(0, 1, 0);
    args.k_strides[2] = args.v_strides[2] = place_of<T>(0, 0, 1);
    args.softmax_scale = 1.0f / std::sqrt(static_cast<float>(model.head_dim));
    DecodeState state;
    // Head by head: of entries of one row, all but the first find its keys and values in cache.
    for (int64_t head = first; head < last; ++head)
      for (int64_t i = 0; i < entries; ++i) {
        const int64_t m = list == nullptr ? i : list[i];
        args.q = buffers.q + m * heads_width();
        args.out = buffers.attended + i * heads_width();
        decode_keys<T, float>(args, state, a.rows[m], head, 0, a.positions[m] + 1);
        write_out<float>(args, state, head);
      }
  }

  // Moves the wanted entries of x side by side; a thread its own columns, those to which `project` adds.
  void keep_wanted() {
    const int64_t begin = team.begin(model.emb_dim, kTileRows), end = team.end(model.emb_dim, kTileRows);
    for (int64_t m = 0; m < a.n_wanted; ++m)
      memmove(buffers.x + m * model.emb_dim + begin, buffers.x + a.wanted[m] * model.emb_dim + begin,
              (end - begin) * sizeof(float));
    count = a.n_wanted;
  }

  void widen(const DecoderLayer& layer) const {
    const float* x = normalise(layer.norm2, nullptr, count);
    multiply_part(buffers.hidden, layer.widen, x, count);
    const int64_t begin = team.begin(model.hidden_dim, kTileRows), end = team.end(model.hidden_dim, kTileRows);
    for (int64_t m = 0; m < count; ++m) {
      float* y = buffers.hidden + m * model.hidden_dim + begin;
      for_lanes(end - begin, [&](int64_t i, int64_t c) { store_lanes(y + i, gelu(load_lanes(y + i, c)), c); });
    }
  }

  void head() const {
    const float* x = normalise(model.final_norm, a.prompt_keys > 0 ? nullptr : a.wanted, a.n_wanted);
    if (a.screen == nullptr || !screened_head(a, x, team)) full_head(x);
    if (a.draw != nullptr) draw_part(*a.draw, team);
  }

  void full_head(const float* x) const {
    const DecoderMatrix& matrix = model.head;
    const int64_t begin = team.begin(matrix.n_out, kTileRows), end = team.end(matrix.n_out, kTileRows);
    multiply_part(a.logits, matrix, x, a.n_wanted);
    if (a.best == nullptr) return;
    for (int64_t m = 0; m < a.n_wanted; ++m)
      buffers.bests[m * team.size + team.thread] = first_largest(a.logits + m * matrix.n_out, begin, end);
    team.wait();
    if (team.thread == 0)
      for (int64_t m = 0; m < a.n_wanted; ++m)
        a.best[m] = best_of_parts(a.logits + m * matrix.n_out, buffers.bests + m * team.size);
  }

  // The parts in their order; -1 is the best of an empty part.
  int64_t best_of_parts(const float* logits, const int64_t* bests) const {
    int64_t best = -1;
    for (int part = 0; part < team.size; ++part)
      if (bests[part] >= 0 && (best < 0 || exceeds(logits[bests[part]], logits[best]))) best = bests[part];
    return best;
  }

  // NaN is the largest of all, as torch.argmax has it.
  static bool exceeds(float a, float b) { return a > b || (a != a && b == b); }

  // The lowest index of the largest number, -1 for none.
  static int64_t first_largest(const float* x, int64_t begin, int64_t end) {
    constexpr int64_t kBlock = 64 * kLanes;
    int64_t best = begin < end ? begin : -1;
    for (int64_t block = begin; block < end; block += kBlock) {
      const int64_t stop = min(block + kBlock, end);
      // Most blocks hold nothing larger, which one comparison of vectors tells. A NaN fails it.
      VecI exceeded = {};
      int64_t i = block;
      const VecF so_far = splat(x[best]);
      for (; i + kLanes <= stop; i += kLanes) exceeded |= ~(load(x + i) <= so_far);
      bool look = i < stop;
      for (int lane = 0; lane < kLanes; ++lane) look |= exceeded[lane] != 0;
      if (!look) continue;
      for (i = block; i < stop; ++i)
        if (exceeds(x[i], x[best])) best = i;
    }
    return best;
  }

  void run() {
    embed();
    team.wait();
    for (int64_t number = 0; number < model.n_layers; ++number) {
      const DecoderLayer& layer = model.layers[number];
      attend(layer, number);
      team.wait();
      if (ends_prompt(number)) keep_wanted();
      if (count == 0) return;
      multiply_part(buffers.x, layer.project, buffers.attended, count, true);
      team.wait();
      widen(layer);
      team.wait();
      multiply_part(buffers.x, layer.narrow, buffers.hidden, count, true);
      team.wait();
    }
    if (a.n_wanted > 0) head();
  }
};

static void decoder_step(const DecoderStepArgs& a) {
  const DecoderBuffers buffers(a, a.workspace);
  run_team(a.num_threads, [&](const Team& team) { DecoderThread{a, *a.model, buffers, team}.run(); });
}

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
