// What the bindings and the kernels share: the arguments of each kernel, and the table of one instruction set's
// kernels.
//
// Offsets and strides count elements, not bytes. A pointer to void is float or Bf16, as the DType beside it says.
#pragma once

#include <cstdint>

#include "decoder_args.h"

namespace fastgpt {

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

struct DropoutAddLayerNormForwardArgs {
  void *total, *normed;       // (rows, n), contiguous
  float *mean, *rstd;         // (rows)
  const void *x, *residual;   // (rows, n), rows x_stride and residual_stride apart
  const void *weight, *bias;  // (n)
  float* factors;             // (num_threads, dropout_row_floats)
  int64_t rows, n, x_stride, residual_stride;
  float eps;
  uint64_t seed;
  int32_t dropout_threshold;  // round(dropout_p * 65536); 0 is no dropout
  DType dtype, weight_dtype;
  int num_threads;
};

struct DropoutAddLayerNormBackwardArgs {
  void *dx, *dresidual;          // (rows, n), contiguous; without dropout dx is not written
  void *dweight, *dbias;         // (n)
  const void *dtotal, *dnormed;  // (rows, n), rows dtotal_stride and dnormed_stride apart; dtotal may be null
  const void *total, *weight;    // (rows, n), contiguous; (n)
  const float *mean, *rstd;      // (rows)
  float *partial, *factors;      // (num_threads, 4, n); (num_threads, dropout_row_floats)
  int64_t rows, n, dtotal_stride, dnormed_stride;
  uint64_t seed;
  int32_t dropout_threshold;
  DType dtype, weight_dtype;
  int num_threads;
};

struct GeluForwardArgs {
  void* out;         // (rows, n), contiguous
  const void* x;     // (rows, n), contiguous
  const void* bias;  // (n), or null
  int64_t rows, n;
  DType dtype, bias_dtype;
  int num_threads;
};

struct GeluBackwardArgs {
  void *dx, *dbias;      // (rows, n), contiguous; (n), or null
  const void *dout, *x;  // (rows, n), contiguous
  const void* bias;      // (n), or null
  float* partial;        // (num_threads, 2, n) with a bias
  int64_t rows, n;
  DType dtype, bias_dtype;
  int num_threads;
};

struct EmbeddingForwardArgs {
  void* out;                      // (batch, n_tokens, n), contiguous
  const int64_t* ids;             // (batch, n_tokens), from 0 to the vocabulary's size - 1
  const void *weight, *position;  // (vocab_size, n), (context_length, n), contiguous
  float* workspace;               // (num_threads, embedding_floats)
  int64_t batch, n_tokens, n;
  uint64_t seed;
  int32_t dropout_threshold;
  DType dtype;
  int num_threads;
};

struct EmbeddingBackwardArgs {
  void *dweight, *dposition;    // (vocab_size, n), (context_length, n), contiguous
  const void* dout;             // (batch, n_tokens, n), contiguous
  const int64_t *first, *next;  // (vocab_size), (batch * n_tokens): the rows of each id in rising order, -1 ends
  float* workspace;             // (num_threads, embedding_floats)
  int64_t batch, n_tokens, n, vocab_size, context_length;
  uint64_t seed;
  int32_t dropout_threshold;
  DType dtype;
  int num_threads;
};

struct CrossEntropyArgs {
  float* losses;           // (rows)
  void* logits;            // (rows, vocab_size), contiguous; holds the gradients afterwards, if `gradient`
  const int64_t* targets;  // (rows), from 0 to vocab_size - 1, or ignore_index
  int64_t rows, vocab_size, ignore_index;
  float scale;  // of the gradients
  bool gradient;
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

// A matrix whose element (i, j) lies at data + i * row_stride + j * column_stride.
struct MatrixRef {
  const void* data;
  int64_t row_stride, column_stride;
  DType dtype;
};

struct GemmArgs {
  void* c;            // (m, n), rows c_stride apart
  float* row_sums;    // (m): the sums of the rows of a; or null
  MatrixRef a, b;     // (m, k), (k, n)
  const float* bias;  // (n), added to every row; or null
  int64_t m, n, k, c_stride;
  bool accumulate;  // add to what c holds
  DType c_dtype;
  int num_threads;
  float* workspace;  // as many as gemm_floats says, aligned to 64 bytes
};

struct KernelTable {
  const char* isa;
  void (*layer_norm_forward)(const LayerNormForwardArgs&);
  void (*layer_norm_backward)(const LayerNormBackwardArgs&);
  int64_t (*dropout_row_floats)(int64_t n);
  void (*dropout_add_layer_norm_forward)(const DropoutAddLayerNormForwardArgs&);
  void (*dropout_add_layer_norm_backward)(const DropoutAddLayerNormBackwardArgs&);
  void (*gelu_forward)(const GeluForwardArgs&);
  void (*gelu_backward)(const GeluBackwardArgs&);
  int64_t (*embedding_floats)(int64_t n);
  void (*embedding_forward)(const EmbeddingForwardArgs&);
  void (*embedding_backward)(const EmbeddingBackwardArgs&);
  void (*cross_entropy)(const CrossEntropyArgs&);
  void (*decode_attention)(const DecodeAttentionArgs&);
  int64_t (*decoder_floats)(const DecoderStepArgs&);
  void (*decoder_step)(const DecoderStepArgs&);
  void (*decoder_pack)(const DecoderPackArgs&);
  int64_t (*screen_floats)(int64_t n_in, int64_t n_wanted, int64_t top_k, int num_threads);
  void (*screen_rows)(const ScreenRowsArgs&);
  int64_t (*draw_bytes)(int64_t count, int64_t n, const DrawOptions&, int num_threads);
  void (*draw_tokens)(const DrawArgs&);
  int64_t (*attention_forward_floats)(const AttentionSizes&, DType, int num_threads);
  void (*attention_forward)(const AttentionForwardArgs&);
  int64_t (*attention_backward_floats)(const AttentionSizes&, DType, int num_threads);
  void (*attention_backward)(const AttentionBackwardArgs&);
  int64_t (*gemm_floats)(const GemmArgs&);
  void (*gemm)(const GemmArgs&);
};

}  // namespace fastgpt
