// The decode step of a whole network: what the bindings give and decoder_cuda.cu runs. No CUDA header.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_launch.h"

namespace fastgpt {
namespace cuda {

// Weights of one layer, all of the step's dtype; matrices (n_out, n_in), contiguous, aligned to 16 bytes. A bias of a
// matrix may be null.
struct DecoderLayer {
  const void *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
  const void *heads[3], *heads_bias[3];  // queries, keys, values: (n_heads * head_dim, emb_dim) each
  const void *project, *project_bias;    // (emb_dim, n_heads * head_dim)
  const void *widen, *widen_bias;        // (hidden_dim, emb_dim)
  const void *narrow, *narrow_bias;      // (emb_dim, hidden_dim)
  void *keys, *values;                   // (batch, n_heads, max_len, head_dim)
  float eps1, eps2;
};

struct DecoderSizes {
  int64_t batch, emb_dim, n_heads, head_dim, hidden_dim, n_logits, max_len;
  int64_t batch_stride, head_stride, row_stride;  // of keys and values
  int64_t splits, most_blocks, most_shared, group;
};

struct DecoderCall {
  std::vector<DecoderLayer> layers;
  const void *norm_weight, *norm_bias, *head, *head_bias, *tok_emb, *pos_emb;
  float eps;
  // Where the kernels leave things; see kernels/cuda/decode_step.cuh and decode_choose.cuh.
  float* x;
  void *queries, *attended, *hidden;
  float* partial;
  uint32_t* arrived;
  uint64_t* best;
  float* logits;  // or null
  int64_t *state, *found;
  const void* draw;   // four 32-bit numbers: 1 / temperature (float), the seed's low and high half, top_k
  bool drawn, top_k;  // whether `draw` is looked at, and its top_k
  bool overlap;
  DecoderSizes sizes;
  DType dtype;  // float32 or bfloat16
  void* stream;
};

int decoder_begin(const DecoderCall& call);
int decoder_step(const DecoderCall& call);

// Many tokens in one launch (kernels/cuda/decode_persistent.cuh), for a batch of 1. blocks 0: the chip has no
// cooperative launches; stages 0: its shared memory is too small.
struct PersistentPlan {
  int blocks, stages;
};

constexpr int64_t kLayerBytes = 152;
constexpr int64_t kMostPersistentWidth = 2048;

int persistent_plan(const DecoderCall& call, PersistentPlan* plan);
// Writes the addresses of all layers to the device and waits: kLayerBytes a layer.
int persistent_upload(const DecoderCall& call, void* table);
// end: the token behind which nothing is wanted, or -1.
int persistent_steps(const DecoderCall& call, PersistentPlan plan, const void* table, int steps, int64_t end);

}  // namespace cuda
}  // namespace fastgpt
