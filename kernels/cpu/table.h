// What the bindings and the kernels share: the arguments of each kernel, and the table of one instruction set's
// kernels.
//
// Offsets and strides count elements, not bytes. A pointer to void is float or Bf16, as the DType beside it says.
#pragma once

#include <cstdint>

#include "decoder_args.h"

namespace fastgpt {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

constexpr int64_t kMaxHeadDim = 256;

struct LayerNormForwardArgs {
  void* out;                  // (rows, n), contiguous
  float *mean, *rstd;         // (rows)
  const void* x;              // (rows, n), rows x_stride apart
  const void *weight, *bias;  // (n)
  int64_t rows, n, x_stride;
  float eps;
  DType dtype, weight_dtype;
  int num_threads;
};

struct LayerNormBackwardArgs {
  void* dx;                  // (rows, n), contiguous
  void *dweight, *dbias;     // (n)
  const void *dout, *x;      // (rows, n), rows dout_stride and x_stride apart
  const void* weight;        // (n)
  const float *mean, *rstd;  // (rows)
  float* partial;            // (num_threads, 4, n): sums of each thread, and of its newest rows
  int64_t rows, n, dout_stride, x_stride;
  DType dtype, weight_dtype;
  int num_threads;
};

struct GeluForwardArgs {
  void* out;
  const void* x;
  int64_t n;
  DType dtype;
  int num_threads;
};

struct GeluBackwardArgs {
  void* dx;
  const void *dout, *x;
  int64_t n;
  DType dtype;
  int num_threads;
};

// A (batch, n_heads, len, head_dim) tensor with a contiguous last axis.
struct HeadsRef {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionSizes {
  int64_t batch, n_heads, q_len, k_len, head_dim;
};

struct AttentionForwardArgs {
  HeadsRef out;
  float* lse;  // (batch, n_heads, q_len)
  HeadsRef q, k, v;
  AttentionSizes sizes;
  float softmax_scale;
  uint64_t seed;
  int32_t dropout_threshold;  // round(dropout_p * 65536); 0 is no dropout
  DType dtype;
  int num_threads;
  float* workspace;  // as many as attention_forward_floats says
};

struct AttentionBackwardArgs {
  HeadsRef dq, dk, dv;
  HeadsRef dout, q, k, v, out;
  const float* lse;
  AttentionSizes sizes;
  float softmax_scale;
  uint64_t seed;
  int32_t dropout_threshold;
  DType dtype;
  int num_threads;
  float* workspace;  // as many as attention_backward_floats says
};

struct DecodeAttentionArgs {
  void* out;               // (batch, n_heads, head_dim), contiguous
  const void* q;           // (batch, n_heads, head_dim)
  const void *k, *v;       // (batch, n_heads, max_len, head_dim)
  const int64_t* lengths;  // (batch), from 1 to max_len
  float* partial;          // (num_threads, 2, head_dim + 2): m, l and acc of heads that threads share
  int64_t* partial_head;   // (num_threads, 2): whose they are, row * n_heads + head
  int64_t batch, n_heads, head_dim;
  int64_t q_strides[2], k_strides[3], v_strides[3];  // the last axis is contiguous
  float softmax_scale;
  DType dtype;
  int num_threads;
};

struct KernelTable {
  const char* isa;
  void (*layer_norm_forward)(const LayerNormForwardArgs&);
  void (*layer_norm_backward)(const LayerNormBackwardArgs&);
  void (*gelu_forward)(const GeluForwardArgs&);
  void (*gelu_backward)(const GeluBackwardArgs&);
  void (*decode_attention)(const DecodeAttentionArgs&);
  int64_t (*decoder_floats)(const DecoderModel&, int64_t count, int num_threads);
  void (*decoder_step)(const DecoderStepArgs&);
  void (*decoder_pack)(const DecoderPackArgs&);
  int64_t (*screen_floats)(int64_t n_in, int64_t n_wanted, int64_t top_k, int num_threads);
  void (*screen_rows)(const ScreenRowsArgs&);
  int64_t (*attention_forward_floats)(const AttentionSizes&, int num_threads);
  void (*attention_forward)(const AttentionForwardArgs&);
  int64_t (*attention_backward_floats)(const AttentionSizes&, int num_threads);
  void (*attention_backward)(const AttentionBackwardArgs&);
};

}  // namespace fastgpt
