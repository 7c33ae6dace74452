// What the bindings call and the .cu files define: no CUDA header, so that the bindings compile with any C++ compiler.
// Every function returns a cudaError_t as int; 0 is success.
#pragma once

#include <cstdint>

namespace fastgpt {
namespace cuda {

// As in fastgpt/ops/extension.py.
enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

const char* error_text(int error);

int gelu_forward(void* out, const void* x, int64_t n, DType dtype, void* stream);
int gelu_backward(void* dx, const void* dout, const void* x, int64_t n, DType dtype, void* stream);

int layer_norm_forward(void* out, float* mean, float* rstd, const void* x, const void* weight, const void* bias,
                       int64_t rows, int64_t n, int64_t x_stride, float eps, DType dtype, DType weight_dtype,
                       void* stream);
int layer_norm_backward(void* dx, void* dweight, void* dbias, float* partial, const void* dout, const void* x,
                        const void* weight, const float* mean, const float* rstd, int64_t rows, int64_t n,
                        int64_t dout_stride, int64_t x_stride, int parts, DType dtype, DType weight_dtype,
                        void* stream);

// (batch, n_heads, length, head_dim) with a contiguous last axis; strides in elements, multiples of 8, and an address
// that is a multiple of 16 bytes.
struct HeadsRef {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

struct AttentionCall {
  int64_t batch, n_heads, q_len, k_len, head_dim;
  float softmax_scale;  // positive
  uint64_t seed;
  uint32_t dropout_threshold;  // 0 .. 65536
  DType dtype;                 // 16 bits
  void* stream;
};

// head_dim from 1 to 128. lse: (batch, n_heads, q_len) float32.
int attention_forward(HeadsRef out, float* lse, HeadsRef q, HeadsRef k, HeadsRef v, const AttentionCall& call);
// The same on a GPU of compute capability 9.0: no stride of 0 along an axis of several elements.
int attention_forward_hopper(HeadsRef out, float* lse, HeadsRef q, HeadsRef k, HeadsRef v, const AttentionCall& call);
// delta: scratch of 2 (batch, n_heads, q_len rounded up to a multiple of 64), a multiple of 16 bytes.
int attention_backward(HeadsRef dq, HeadsRef dk, HeadsRef dv, float* delta, HeadsRef dout, HeadsRef q, HeadsRef k,
                       HeadsRef v, HeadsRef out, const float* lse, const AttentionCall& call);
int attention_backward_hopper(HeadsRef dq, HeadsRef dk, HeadsRef dv, float* delta, HeadsRef dout, HeadsRef q,
                              HeadsRef k, HeadsRef v, HeadsRef out, const float* lse, const AttentionCall& call);

struct DecodeCall {
  int64_t batch, n_heads, max_len, head_dim;
  int splits;  // parts of max_len, a block each
  float softmax_scale;
  DType dtype;
  void* stream;
};

// out: (batch, n_heads, head_dim), contiguous; partial: (batch * n_heads, splits, 2 + head_dim) float32; q: without
// rows; lengths: (batch,) on the device.
int decode_attention(void* out, float* partial, HeadsRef q, HeadsRef k, HeadsRef v, const int64_t* lengths,
                     const DecodeCall& call);

struct CrossEntropyCall {
  int64_t rows, padded, vocab_size, ignore_index;
  bool gradient;  // written over the logits
  DType dtype;
  void* stream;
};

// logits: (rows, padded), aligned to 16 bytes, padded a multiple of 8; count: one number on the device.
int cross_entropy(float* losses, void* logits, const int64_t* targets, const int64_t* count,
                  const CrossEntropyCall& call);

}  // namespace cuda
}  // namespace fastgpt
