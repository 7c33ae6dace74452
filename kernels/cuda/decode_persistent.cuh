// Many tokens of one row in one launch: the whole network, over and over, by blocks that stay, one a multiprocessor.
//
// Phases of a token, a barrier of the grid behind each (grid_barrier.cuh), 5 a layer and 1 for the head:
//   queries, keys, values = norm1(x) W^T + b         keys and values go straight into the cache
//   parts of attention(queries, cache)               a block a part of the keys of a head
//   x += (the parts joined) W^T + b                  joined by every block for itself
//   hidden = gelu(norm2(x) W^T + b)
//   x += hidden W^T + b
//   the likeliest of final_norm(x) W^T + b, block by block
// The next token is chosen by every block for itself, from what the blocks found, so no barrier follows; only with
// top_k one block looks at all logits, behind one barrier more. Noise and ties are those of decode_choose.cuh. A row
// that meets its end stops.
//
// Weights do not depend on the token, so reading them does not wait for anything: each warp copies its items
// (decode_stream.cuh), kStages of them, into a ring in shared memory while it works and while it waits. A lane copies
// what it will multiply itself, so the ring needs no barrier but the lane's own wait. Products: a warp an item, float32
// FMA, x from shared memory as float32; the sums of a row's parts are added in order, so timing does not show.
//
// Bytes: every weight once a token, 247 MB for GPT-2 124M in bfloat16: 58 us on an H200 at its copy rate, 66 at 1,024
// keys. Barriers: 5 x 12 + 1 = 61; at 1 to 1.5 us each, with loads of the second cache behind, 60 to 90 us. The ring
// holds 192 KiB a multiprocessor, more than a layer's 108 KiB, so reading goes on behind the barriers and the two times
// overlap for the most part: 85 to 120 us a token are expected, 8 to 12 thousand tokens a second, against 150 to 190 us
// for the graph of decode_step.cuh. These are estimates; no GPU has run this file yet.
#pragma once

#include "decode_persistent_call.cuh"
#include "grid_barrier.cuh"

namespace fastgpt {
namespace cuda {

template <class T, int kStages, int kPacks>
struct StreamBlock {
  static constexpr int kSize = Pack<T>::kSize;

  const StreamCall<T>& call;
  StreamLayout at;
  StreamLayer<T>* layers;
  StreamShare* shares;
  float *scratch, *input, *sums;
  Pack<T>* ring;  // of this lane: piece p of stage s at (s * kItemPieces + p) * kWarp
  GridBarrier barrier;
  StreamCursor cursor;
  int warp, lane, stage = 0, base = 0;

  __device__ explicit StreamBlock(const StreamCall<T>& call)
      : call(call), at(StreamLayout::of(call, gridDim.x)), barrier{call.arrived, {gridDim.x, 0}} {
    unsigned char* shared = dynamic_shared();
    warp = static_cast<int>(threadIdx.x) / kWarp;
    lane = static_cast<int>(threadIdx.x) % kWarp;
    layers = reinterpret_cast<StreamLayer<T>*>(shared);
    shares = reinterpret_cast<StreamShare*>(shared + at.shares);
    scratch = reinterpret_cast<float*>(shared + at.scratch);
    input = reinterpret_cast<float*>(shared + at.input);
    sums = reinterpret_cast<float*>(shared + at.sums);
    ring = reinterpret_cast<Pack<T>*>(shared + at.ring) + warp * kStages * kItemPieces * kWarp + lane;
    const int words = call.n_layers * static_cast<int>(sizeof(StreamLayer<T>) / sizeof(uint64_t));
    for (int i = threadIdx.x; i < words; i += kStreamThreads)
      reinterpret_cast<uint64_t*>(layers)[i] = reinterpret_cast<const uint64_t*>(call.layers)[i];
    if (threadIdx.x < kStreamMatrices)
      shares[threadIdx.x] = call.share(static_cast<int>(threadIdx.x), blockIdx.x, gridDim.x);
    __syncthreads();
    cursor = StreamCursor::begin(warp, call.n_layers, call.steps);
    for (int i = 0; i < kStages; ++i) copy_item(i);
  }

  // The first of this lane's weights of a row.
  __device__ const T* row_of(int layer, int matrix, int row) const {
    const int64_t columns = shares[matrix].columns;
    if (matrix == kHeadMatrix) return call.head + row * columns;
    if (matrix != kHeadsMatrix) return layers[layer].weight[matrix + 2] + row * columns;
    const int part = row / call.heads();
    return layers[layer].weight[part] + (row - part * call.heads()) * columns;
  }

  // Begins to copy the warp's next item. A group of copies is made of each, or of nothing at the end.
  __device__ void copy_item(int to) {
    if (cursor.settle(shares)) {
      const StreamShare& share = shares[cursor.matrix];
      const int row = share.row_of(cursor.item), part = cursor.item - row * share.parts;
      const int first = (part * share.pieces * kWarp + lane) * kSize;
      const T* from = row_of(cursor.layer, cursor.matrix, share.begin + row) + first;
#pragma unroll
      for (int i = 0; i < kItemPieces; ++i)
        if (i < share.pieces && first + i * kWarp * kSize < share.columns)
          copy_async_16(ring + (to * kItemPieces + i) * kWarp, from + i * kWarp * kSize, 16);
      cursor.item += kStreamWarps;
    }
    copy_async_commit();
  }

  // The products of this block's rows with the input, into `sums`.
  __device__ void multiply(int matrix) {
    const StreamShare& share = shares[matrix];
    int number = 0;
    for (int item = StreamShare::first_of(warp, base); item < share.items; item += kStreamWarps, ++number) {
      copy_async_wait<kStages - 1>();
      const int part = item - share.row_of(item) * share.parts, piece0 = part * share.pieces;
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < kItemPieces; ++i) {
        if (i >= share.pieces || ((piece0 + i) * kWarp + lane) * kSize >= share.columns) continue;
        const Pack<T> w = load_shared(ring + (stage * kItemPieces + i) * kWarp);
        const float* in = input + (piece0 + i) * kWarp * kSize + lane * 4;
#pragma unroll
        for (int j = 0; j < kSize; j += 4) {
          const Pack<float> x = load_shared(reinterpret_cast<const Pack<float>*>(in + j * kWarp));
#pragma unroll
          for (int l = 0; l < 4; ++l) sum[l] += to_float(w.values[j + l]) * x.values[l];
        }
      }
      const float all = warp_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
      if (lane == 0) store_shared(sums + warp * at.sums_of_warp + number, all);
      // What was read is in registers: the stage is free.
      copy_item(stage);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }

  // The sum of row i of this block.
  __device__ float sum_of(const StreamShare& share, int i) const {
    float y = 0.0f;
    for (int item = i * share.parts; item < (i + 1) * share.parts; ++item)
      y += load_shared(sums + (base + item) % kStreamWarps * at.sums_of_warp + item / kStreamWarps);
    return y;
  }

  // The sum over the block, in every thread; `turn` alternates, so one barrier is enough.
  __device__ float block_sum(float x, int turn) {
    x = warp_sum(x);
    float* parts = scratch + turn * kStreamWarps * 4;
    if (lane == 0) store_shared(parts + warp * 4, x);
    __syncthreads();
    x = 0.0f;
#pragma unroll
    for (int i = 0; i < kStreamWarps; ++i) x += load_shared(parts + i * 4);
    return x;
  }

  // The weight and the bias of a norm at this thread's columns: asked for before the barrier behind which x is there.
  __device__ void load_norm(float (&weight)[4], float (&bias)[4], const T* weights, const T* biases) const {
    const int column = static_cast<int>(threadIdx.x) * 4;
    if (column >= call.width()) return;
    load_quad(weight, weights + column);
    load_quad(bias, biases + column);
  }

  // input = norm(x) for this thread's columns of x.
  __device__ void stage_normed(const float (&x)[4], const float (&weight)[4], const float (&bias)[4], float eps) {
    const int column = static_cast<int>(threadIdx.x) * 4, n = call.width();
    const bool exists = column < n;
    const float mean = block_sum(exists ? (x[0] + x[1]) + (x[2] + x[3]) : 0.0f, 0) / n;
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) squares += (x[j] - mean) * (x[j] - mean);
    const float rstd = 1.0f / sqrtf(block_sum(exists ? squares : 0.0f, 1) / n + eps);
    if (exists) {
      Pack<float> out;
#pragma unroll
      for (int j = 0; j < 4; ++j) out.values[j] = (x[j] - mean) * rstd * weight[j] + bias[j];
      store_shared(reinterpret_cast<Pack<float>*>(input + stream_place(column, kSize)), out);
    }
    __syncthreads();
  }

  __device__ void load_x(float (&x)[4]) const {
    const int column = static_cast<int>(threadIdx.x) * 4;
    if (column >= call.width()) return;
    const Pack<float> p = read_l2(reinterpret_cast<const Pack<float>*>(call.x + column));
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = p.values[j];
  }

  __device__ void stage_hidden() {
    for (int column = static_cast<int>(threadIdx.x) * kSize; column < call.hidden_dim;
         column += kStreamThreads * kSize) {
      const Pack<T> p = read_l2(reinterpret_cast<const Pack<T>*>(call.hidden + column));
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        Pack<float> out;
#pragma unroll
        for (int l = 0; l < 4; ++l) out.values[l] = to_float(p.values[j + l]);
        store_shared(reinterpret_cast<Pack<float>*>(input + stream_place(column + j, kSize)), out);
      }
    }
    __syncthreads();
  }

  __device__ void attend(const StreamLayer<T>& layer, int64_t length) {
    int used;
    const int64_t part = call.keys_of_part(length, static_cast<int>(gridDim.x), used);
    const int units = static_cast<int>(call.sizes.n_heads) * used;
    for (int unit = blockIdx.x; unit < units; unit += gridDim.x) {
      const int head = unit / used, split = unit - head * used;
      const int64_t begin = split * part, end = begin + part < length ? begin + part : length;
      attend_part<T, kPacks, kStreamWarps, true>(
          call.partial + (static_cast<int64_t>(head) * call.sizes.splits + split) * (2 + call.sizes.head_dim), input,
          call.queries + head * call.sizes.head_dim, layer.keys + head * call.head_stride, call.row_stride,
          layer.values + head * call.head_stride, call.row_stride, begin, end, call.sizes);
      __syncthreads();
    }
  }

  // input = attention, its parts joined in order.
  __device__ void stage_attended(int64_t length) {
    int used;
    call.keys_of_part(length, static_cast<int>(gridDim.x), used);
    const int head_dim = call.sizes.head_dim, stride = 2 + head_dim;
    for (int column = threadIdx.x; column < call.heads(); column += kStreamThreads) {
      const int head = column / head_dim, d = column - head * head_dim;
      const float* parts = call.partial + static_cast<int64_t>(head) * call.sizes.splits * stride;
      float m = -INFINITY, l = 0.0f, acc = 0.0f;
      for (int first = 0; first < used; first += kJoined) {
        float part_m[kJoined], part_l[kJoined], part_acc[kJoined], largest = m;
#pragma unroll
        for (int i = 0; i < kJoined; ++i) {
          const float* part = parts + (first + i) * stride;
          const bool exists = first + i < used;
          part_m[i] = exists ? read_l2(part) : -INFINITY;
          part_l[i] = exists ? read_l2(part + 1) : 0.0f;
          part_acc[i] = exists ? read_l2(part + 2 + d) : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < kJoined; ++i) largest = fmaxf(largest, part_m[i]);
        const float before = m == -INFINITY ? 0.0f : fast_exp2(m - largest);
        l *= before;
        acc *= before;
        m = largest;
#pragma unroll
        for (int i = 0; i < kJoined; ++i) {
          const float weight = part_m[i] == -INFINITY ? 0.0f : fast_exp2(part_m[i] - m);
          l += part_l[i] * weight;
          acc += part_acc[i] * weight;
        }
      }
      // As decode_step.cuh rounds it.
      store_shared(input + stream_place(column, kSize), to_float(from_float<T>(acc / l)));
    }
    __syncthreads();
  }

  // What is added to the sum of row i: the bias, and x where the sum is added to x.
  __device__ float addend(int layer, int matrix, int i) const {
    const int o = shares[matrix].begin + i, heads = call.heads();
    const int part = matrix == kHeadsMatrix ? o / heads : 0, column = o - part * heads;
    const T* bias = call.head_bias;
    if (matrix != kHeadMatrix) bias = layers[layer].bias[matrix == kHeadsMatrix ? part : matrix + 2];
    float y = bias == nullptr ? 0.0f : to_float(bias[column]);
    if (matrix == kProjectMatrix || matrix == kNarrowMatrix) y += read_l2(call.x + o);
    return y;
  }

  // What follows the sum of row i of this block, y. Returns its key where it is a row of the head.
  __device__ uint64_t emit(int layer, int matrix, int i, float y, int64_t length, int64_t drawn) {
    const int o = shares[matrix].begin + i;
    if (matrix == kHeadMatrix) {
      if (call.logits != nullptr) write_l2(call.logits + o, y);
      if (call.draw != nullptr && !call.top_k) y = call.draw->perturb(y, o, 0, drawn);
      return choice_key(y, o);
    }
    if (matrix == kWidenMatrix) {
      write_l2(call.hidden + o, from_float<T>(gelu(y)));
    } else if (matrix != kHeadsMatrix) {
      write_l2(call.x + o, y);
    } else {
      const int heads = call.heads(), part = o / heads, column = o - part * heads;
      const int head = column / call.sizes.head_dim, d = column - head * call.sizes.head_dim;
      T* to = part == 1 ? layers[layer].keys : layers[layer].values;
      to = part == 0 ? call.queries + column : to + head * call.head_stride + (length - 1) * call.row_stride + d;
      write_l2(to, from_float<T>(y));
    }
    return 0;
  }

  // One matrix, whose input is staged: its outputs go where they belong. Returns the likeliest of this thread's rows of
  // the head.
  __device__ uint64_t product(int layer, int matrix, int64_t length, int64_t drawn) {
    const StreamShare& share = shares[matrix];
    const int mine = static_cast<int>(threadIdx.x);
    // Asked for while the products run.
    const float early = mine < share.rows ? addend(layer, matrix, mine) : 0.0f;
    prefetch_norm(call, layers, layer, matrix);
    multiply(matrix);
    __syncthreads();
    uint64_t best = 0;
    for (int i = mine; i < share.rows; i += kStreamThreads) {
      const float y = sum_of(share, i) + (i == mine ? early : addend(layer, matrix, i));
      best = most(best, emit(layer, matrix, i, y, length, drawn));
    }
    base = share.base_after(base);
    return best;
  }

  // The likeliest token, in every thread of every block. `mine`: of this thread's outputs of the head.
  __device__ int64_t choose(uint64_t mine, int64_t drawn) {
    ChooseShared& shared = *reinterpret_cast<ChooseShared*>(input);
    // The half that the next norm's second sum takes.
    uint64_t* keys = reinterpret_cast<uint64_t*>(scratch + kStreamWarps * 4);
    __syncthreads();
    mine = block_most<kStreamThreads>(mine, keys);
    if (threadIdx.x == 0) write_l2(call.best + blockIdx.x, mine);
    barrier.wait();
    uint64_t key = 0;
    int found = static_cast<int>(gridDim.x);
    if (call.top_k) {
      if (blockIdx.x == 0) {
        const DrawOptions draw = *call.draw;
        const uint32_t least =
            kth_largest<kStreamThreads>(call.logits, call.n_logits, draw.top_k, shared.histogram, shared.found);
        for (int i = threadIdx.x; i < call.n_logits; i += kStreamThreads) {
          const float logit = read_l2(call.logits + i);
          if (ordered(logit) >= least) key = most(key, choice_key(draw.perturb(logit, i, 0, drawn), i));
        }
        key = block_most<kStreamThreads>(key, keys);
        if (threadIdx.x == 0) write_l2(call.best, key);
        key = 0;
      }
      barrier.wait();
      found = 1;
    }
    for (int i = threadIdx.x; i < found; i += kStreamThreads) key = most(key, read_l2(call.best + i));
    key = block_most<kStreamThreads>(key, keys);
    return 0xffffffffu - static_cast<uint32_t>(key);
  }

  // This thread's columns of a token's embedding; block 0 keeps x for those who add to it.
  __device__ void embed(float (&x)[4], int64_t token, int64_t position) const {
    const int column = static_cast<int>(threadIdx.x) * 4;
    if (column >= call.width()) return;
    float place[4];
    load_quad(x, call.table.tokens + token * call.width() + column);
    load_quad(place, call.table.positions + position * call.width() + column);
    Pack<float> out;
#pragma unroll
    for (int j = 0; j < 4; ++j) out.values[j] = x[j] += place[j];
    if (blockIdx.x == 0) write_l2(reinterpret_cast<Pack<float>*>(call.x + column), out);
  }

  __device__ void run() {
    int64_t token = call.state[kToken], length = call.state[kLength], place = call.state[kPlace];
    int64_t drawn = call.state[kDrawn];
    for (int step = 0; step < call.steps; ++step) {
      float x[4] = {}, weight[4] = {}, bias[4] = {};
      embed(x, token, length - 1);
      for (int layer = 0; layer < call.n_layers; ++layer) {
        const StreamLayer<T>& l = layers[layer];
        for (int matrix = kHeadsMatrix; matrix <= kNarrowMatrix; ++matrix) {
          if (matrix == kProjectMatrix) {
            stage_attended(length);
          } else if (matrix == kNarrowMatrix) {
            stage_hidden();
          } else {
            const int which = matrix == kWidenMatrix;
            // Layer 0 has it from the embedding.
            if (layer > 0 || which == 1) load_x(x);
            load_norm(weight, bias, l.norm_weight[which], l.norm_bias[which]);
            stage_normed(x, weight, bias, l.eps[which]);
          }
          product(layer, matrix, length, drawn);
          barrier.wait();
          if (matrix != kHeadsMatrix) continue;
          attend(l, length);
          barrier.wait();
        }
      }
      load_x(x);
      load_norm(weight, bias, call.norm.weight, call.norm.bias);
      stage_normed(x, weight, bias, call.norm.eps);
      token = choose(product(0, kHeadMatrix, length, drawn), drawn);
      // A row at the end of its cache stays there: nobody reads it any more.
      length = length < call.max_len ? length + 1 : length;
      if (blockIdx.x == 0 && threadIdx.x == 0 && place < call.group) call.found[place] = token;
      ++place;
      ++drawn;
      if (token == call.end) break;
    }
    copy_async_wait<0>();
    if (blockIdx.x != 0 || threadIdx.x != 0) return;
    call.state[kToken] = token;
    call.state[kLength] = length;
    call.state[kPlace] = place;
    call.state[kDrawn] = drawn;
  }
};

template <class T, int kStages, int kPacks>
__global__ void __launch_bounds__(kStreamThreads, 1)
    decode_persistent_kernel(const __grid_constant__ StreamCall<T> call) {
  StreamBlock<T, kStages, kPacks>(call).run();
}

}  // namespace cuda
}  // namespace fastgpt
