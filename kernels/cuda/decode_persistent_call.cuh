// What a persistent decoder (decode_persistent.cuh) is given, and where things stand in the shared memory of a block.
#pragma once

#include "decode_attention.cuh"
#include "decode_choose.cuh"
#include "decode_linear.cuh"
#include "decode_stream.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kStreamThreads = kStreamWarps * kWarp;
// Elements that the norm takes: 4 a thread.
constexpr int kMostStreamWidth = 4 * kStreamThreads;
// A block reads at least so many keys, those that its warps take at once where head_dim is 64.
constexpr int kLeastStreamKeys = 64;
// Parts of the attention that a thread loads at once.
constexpr int kJoined = 8;

template <class T>
struct StreamLayer {
  const T *norm_weight[2], *norm_bias[2];
  // Queries, keys, values, projection, widen, narrow; a bias may be null.
  const T *weight[6], *bias[6];
  T *keys, *values;
  float eps[2];
};

template <class T>
struct StreamCall {
  const StreamLayer<T>* layers;
  RowNorm<T> norm;
  const T *head, *head_bias;
  Embeddings<T> table;
  // As in decode_step.cuh, for a batch of 1; arrived: one number, 0 at the launch.
  float* x;
  T *queries, *hidden;
  float* partial;
  uint32_t* arrived;
  uint64_t* best;
  float* logits;  // or null
  int64_t *state, *found;
  const DrawOptions* draw;  // null for the likeliest token
  bool top_k;
  int n_layers, hidden_dim, n_logits, max_len, group, steps;
  int64_t end;  // the token that ends the row, or -1
  int64_t head_stride, row_stride;
  DecodeSizes sizes;

  __host__ __device__ int width() const { return table.width; }
  __host__ __device__ int heads() const { return static_cast<int>(sizes.n_heads) * sizes.head_dim; }

  // Keys of a part of the attention, and how many parts there are.
  __device__ int64_t keys_of_part(int64_t length, int blocks, int& used) const {
    const int fitting = static_cast<int>(blocks / sizes.n_heads);
    const int most = fitting < 1 ? 1 : fitting < sizes.splits ? fitting : sizes.splits;
    int64_t part = (length + most - 1) / most;
    part = part < kLeastStreamKeys ? kLeastStreamKeys : part;
    used = static_cast<int>((length + part - 1) / part);
    return part;
  }

  __host__ __device__ StreamShare share(int matrix, int block, int blocks) const {
    constexpr int kSize = Pack<T>::kSize;
    switch (matrix) {
      case kHeadsMatrix: return StreamShare::of(3 * heads(), width(), kSize, block, blocks);
      case kProjectMatrix: return StreamShare::of(width(), heads(), kSize, block, blocks);
      case kWidenMatrix: return StreamShare::of(hidden_dim, width(), kSize, block, blocks);
      case kNarrowMatrix: return StreamShare::of(width(), hidden_dim, kSize, block, blocks);
      default: return StreamShare::of(n_logits, width(), kSize, block, blocks);
    }
  }
};

// Where things stand in shared memory, in bytes.
struct StreamLayout {
  int layers, shares, scratch, input, sums, ring, sums_of_warp;
  int64_t bytes;  // without the ring

  template <class T>
  __host__ __device__ static StreamLayout of(const StreamCall<T>& call, int blocks) {
    const auto rounded = [](int64_t bytes) { return (bytes + 127) / 128 * 128; };
    int columns = 0, items = 0;
    for (int i = 0; i < kStreamMatrices; ++i) {
      // Shares differ by one row at most, so no block has more than one row more than this.
      const StreamShare share = call.share(i, 0, blocks);
      columns = columns > share.columns ? columns : share.columns;
      const int most = share.items + share.parts;
      items = items > most ? items : most;
    }
    // The input is also the room of the attention's sums and of the choice.
    int64_t input = rounded(static_cast<int64_t>(columns + kWarp * Pack<T>::kSize) * sizeof(float));
    const int64_t attention = rounded(kStreamWarps * shared_decode_stride(call.sizes.head_dim) * sizeof(float));
    input = input > attention ? input : attention;
    if (call.top_k && input < static_cast<int64_t>(sizeof(ChooseShared))) input = rounded(sizeof(ChooseShared));
    StreamLayout out = {};
    int64_t at = rounded(static_cast<int64_t>(call.n_layers) * sizeof(StreamLayer<T>));
    out.shares = static_cast<int>(at);
    at += rounded(kStreamMatrices * sizeof(StreamShare));
    out.scratch = static_cast<int>(at);
    at += 2 * kStreamWarps * 16;
    out.input = static_cast<int>(at);
    at += input;
    out.sums = static_cast<int>(at);
    out.sums_of_warp = ((items + kStreamWarps - 1) / kStreamWarps + 3) / 4 * 4;
    at += rounded(static_cast<int64_t>(kStreamWarps) * out.sums_of_warp * sizeof(float));
    out.ring = static_cast<int>(at);
    out.bytes = at;
    return out;
  }
};

// Bytes of one stage of the ring.
constexpr int kStageBytes = kStreamWarps * kItemPieces * kWarp * 16;

// Four neighbouring elements, loaded at once.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T values[4];
};

template <class T>
__device__ inline void load_quad(float (&to)[4], const T* from) {
  const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(from);
#pragma unroll
  for (int j = 0; j < 4; ++j) to[j] = to_float(quad.values[j]);
}

// Asks for the norm that comes two phases on, so that it waits in the second cache.
template <class T>
__device__ inline void prefetch_norm(const StreamCall<T>& call, const StreamLayer<T>* layers, int layer, int matrix) {
  const int column = static_cast<int>(threadIdx.x) * 4;
  if (column >= call.width() || column * sizeof(T) % 128 != 0) return;
  if (matrix != kProjectMatrix && matrix != kNarrowMatrix) return;
  const T *weight = call.norm.weight, *bias = call.norm.bias;
  const int next = matrix == kProjectMatrix ? layer : layer + 1, which = matrix == kProjectMatrix;
  if (next < call.n_layers) {
    weight = layers[next].norm_weight[which];
    bias = layers[next].norm_bias[which];
  }
  prefetch(weight + column);
  prefetch(bias + column);
}

}  // namespace cuda
}  // namespace fastgpt
