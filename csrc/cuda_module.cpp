// fastgpt._cuda: the CUDA kernels. It links no PyTorch: tensors come as addresses, the stream as torch's raw handle.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "checks.h"
#include "cuda_bindings.h"
#include "cuda_launch.h"

namespace fastgpt {
namespace {

cuda::DType to_cuda_dtype(int code, const char* what) {
  require(code >= 0 && code <= 2, std::string(what) + ": unknown dtype code " + std::to_string(code));
  return static_cast<cuda::DType>(code);
}

int64_t size_of(cuda::DType dtype) { return dtype == cuda::DType::kFloat32 ? 4 : 2; }

void* to_stream(Address stream) { return reinterpret_cast<void*>(stream); }

void gelu_forward(Address out, Address x, int64_t n, int dtype_code, Address stream) {
  const char* what = "gelu_forward";
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what);
  check_sizes({n}, what);
  const int64_t size = size_of(dtype);
  check_launch(cuda::gelu_forward(pointer(out, n, size, what), pointer(x, n, size, what), n, dtype, to_stream(stream)),
               what);
}

void gelu_backward(Address dx, Address dout, Address x, int64_t n, int dtype_code, Address stream) {
  const char* what = "gelu_backward";
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what);
  check_sizes({n}, what);
  const int64_t size = size_of(dtype);
  check_launch(cuda::gelu_backward(pointer(dx, n, size, what), pointer(dout, n, size, what), pointer(x, n, size, what),
                                   n, dtype, to_stream(stream)),
               what);
}

void layer_norm_forward(Address out, Address mean, Address rstd, Address x, Address weight, Address bias, int64_t rows,
                        int64_t n, int64_t x_stride, float eps, int dtype_code, int weight_dtype_code, Address stream) {
  const char* what = "layer_norm_forward";
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what), weight_dtype = to_cuda_dtype(weight_dtype_code, what);
  check_sizes({rows, n}, what);
  check_sizes({rows, x_stride}, what);
  if (n == 0) return;
  const int64_t size = size_of(dtype), weight_size = size_of(weight_dtype);
  check_launch(cuda::layer_norm_forward(pointer(out, rows * n, size, what), float_pointer(mean, rows, what),
                                        float_pointer(rstd, rows, what), pointer(x, rows * n, size, what),
                                        pointer(weight, n, weight_size, what), pointer(bias, n, weight_size, what),
                                        rows, n, x_stride, eps, dtype, weight_dtype, to_stream(stream)),
               what);
}

void layer_norm_backward(Address dx, Address dweight, Address dbias, Address partial, Address dout, Address x,
                         Address weight, Address mean, Address rstd, int64_t rows, int64_t n, int64_t dout_stride,
                         int64_t x_stride, int parts, int dtype_code, int weight_dtype_code, Address stream) {
  const char* what = "layer_norm_backward";
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what), weight_dtype = to_cuda_dtype(weight_dtype_code, what);
  require(parts >= 1 && parts <= 65535, "layer_norm_backward: parts must be from 1 to 65535");
  check_sizes({rows, n}, what);
  check_sizes({rows, x_stride}, what);
  check_sizes({rows, dout_stride}, what);
  check_sizes({parts, 2, n}, what);
  if (n == 0) return;
  const int64_t size = size_of(dtype), weight_size = size_of(weight_dtype);
  check_launch(cuda::layer_norm_backward(pointer(dx, rows * n, size, what), pointer(dweight, n, weight_size, what),
                                         pointer(dbias, n, weight_size, what), float_pointer(partial, parts * n, what),
                                         pointer(dout, rows * n, size, what), pointer(x, rows * n, size, what),
                                         pointer(weight, n, weight_size, what), float_pointer(mean, rows, what),
                                         float_pointer(rstd, rows, what), rows, n, dout_stride, x_stride, parts, dtype,
                                         weight_dtype, to_stream(stream)),
               what);
}

// As tensor.stride() gives them.
using Strides = std::array<int64_t, 4>;

// A (batch, n_heads, len, head_dim) tensor of 16-bit numbers that can be copied 16 bytes at a time.
cuda::HeadsRef heads(Address address, const Strides& strides, const cuda::AttentionCall& call, int64_t len,
                     const char* what) {
  check_sizes({call.batch, strides[0], 8}, what);
  check_sizes({call.n_heads, strides[1], 8}, what);
  check_sizes({len, strides[2], 8}, what);
  check_sizes({call.batch, call.n_heads, len, call.head_dim}, what);
  const int64_t count = call.batch * call.n_heads * len * call.head_dim;
  if (count == 0) return {nullptr, 0, 0, 0};
  require(strides[3] == 1 || call.head_dim == 1, std::string(what) + ": the last axis must be contiguous");
  return {pointer(address, count, 2, what), strides[0], strides[1], strides[2]};
}

// One that the kernels read.
cuda::HeadsRef readable(Address address, const Strides& strides, const cuda::AttentionCall& call, int64_t len,
                        const char* what) {
  const cuda::HeadsRef x = heads(address, strides, call, len, what);
  require(address % 16 == 0 && x.batch_stride % 8 == 0 && x.head_stride % 8 == 0 && x.row_stride % 8 == 0,
          std::string(what) + ": an input must be aligned to 16 bytes, with strides that are multiples of 8");
  return x;
}

// One that they write, two numbers at a time where head_dim is even.
cuda::HeadsRef writable(Address address, const Strides& strides, const cuda::AttentionCall& call, int64_t len,
                        const char* what) {
  const cuda::HeadsRef x = heads(address, strides, call, len, what);
  require(call.head_dim % 2 != 0 ||
              (address % 4 == 0 && x.batch_stride % 2 == 0 && x.head_stride % 2 == 0 && x.row_stride % 2 == 0),
          std::string(what) + ": an output must be aligned to 4 bytes, with even strides");
  return x;
}

cuda::AttentionCall attention_call(const std::array<int64_t, 5>& sizes, float softmax_scale, uint64_t seed,
                                   int64_t dropout_threshold, int dtype_code, Address stream, const char* what) {
  const std::string name = what;
  for (int64_t size : sizes) require(size >= 0, name + ": a size is negative");
  require(sizes[2] <= sizes[3], name + ": q_len must be at most k_len");
  require(sizes[4] >= 1 && sizes[4] <= 128, name + ": head_dim must be from 1 to 128");
  // Positions of a block, the last of which may lie behind the end, have 32 bits.
  require(sizes[3] < (int64_t{1} << 31) - 256, name + ": k_len must be below 2**31 - 256");
  require(softmax_scale > 0.0f, name + ": softmax_scale must be positive");
  require(dropout_threshold >= 0 && dropout_threshold <= 65536, name + ": dropout_threshold must be from 0 to 65536");
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what);
  require(dtype != cuda::DType::kFloat32, name + ": the kernels take bfloat16 and float16");
  return {sizes[0], sizes[1],         sizes[2], sizes[3],
          sizes[4], softmax_scale,    seed,     static_cast<uint32_t>(dropout_threshold),
          dtype,    to_stream(stream)};
}

template <decltype(&cuda::attention_forward) kLaunch>
void attention_forward(Address out, const Strides& out_strides, Address lse, Address q, const Strides& q_strides,
                       Address k, const Strides& k_strides, Address v, const Strides& v_strides,
                       const std::array<int64_t, 5>& sizes, float softmax_scale, uint64_t seed,
                       int64_t dropout_threshold, int dtype_code, Address stream) {
  const char* what = "attention_forward";
  const cuda::AttentionCall call =
      attention_call(sizes, softmax_scale, seed, dropout_threshold, dtype_code, stream, what);
  check_launch(kLaunch(writable(out, out_strides, call, call.q_len, what),
                       float_pointer(lse, call.batch * call.n_heads * call.q_len, what),
                       readable(q, q_strides, call, call.q_len, what), readable(k, k_strides, call, call.k_len, what),
                       readable(v, v_strides, call, call.k_len, what), call),
               what);
}

template <decltype(&cuda::attention_backward) kLaunch>
void attention_backward(Address dq, const Strides& dq_strides, Address dk, const Strides& dk_strides, Address dv,
                        const Strides& dv_strides, Address delta, Address dout, const Strides& dout_strides, Address q,
                        const Strides& q_strides, Address k, const Strides& k_strides, Address v,
                        const Strides& v_strides, Address out, const Strides& out_strides, Address lse,
                        const std::array<int64_t, 5>& sizes, float softmax_scale, uint64_t seed,
                        int64_t dropout_threshold, int dtype_code, Address stream) {
  const char* what = "attention_backward";
  const cuda::AttentionCall call =
      attention_call(sizes, softmax_scale, seed, dropout_threshold, dtype_code, stream, what);
  const int64_t heads_count = multiply(call.batch, call.n_heads, what), rows = multiply(heads_count, call.q_len, what);
  const int64_t scratch = multiply(heads_count, 2 * ((call.q_len + 63) / 64 * 64), what);
  require(delta % 16 == 0, "attention_backward: delta must be aligned to 16 bytes");
  check_launch(
      kLaunch(writable(dq, dq_strides, call, call.q_len, what), writable(dk, dk_strides, call, call.k_len, what),
              writable(dv, dv_strides, call, call.k_len, what), float_pointer(delta, scratch, what),
              readable(dout, dout_strides, call, call.q_len, what), readable(q, q_strides, call, call.q_len, what),
              readable(k, k_strides, call, call.k_len, what), readable(v, v_strides, call, call.k_len, what),
              readable(out, out_strides, call, call.q_len, what), float_pointer(lse, rows, what), call),
      what);
}

// strides: of q (batch, head), k_cache and v_cache (batch, head, row). sizes: batch, n_heads, max_len, head_dim.
void decode_attention(Address out, Address partial, Address q, Address k, Address v, Address lengths,
                      const std::array<int64_t, 8>& strides, const std::array<int64_t, 4>& sizes, int splits,
                      float softmax_scale, int dtype_code, Address stream) {
  const char* what = "decode_attention";
  const cuda::DType dtype = to_cuda_dtype(dtype_code, what);
  const auto [batch, n_heads, max_len, head_dim] = sizes;
  const int64_t size = size_of(dtype), piece = 16 / size;
  require(splits >= 1 && splits <= 65535, "decode_attention: splits must be from 1 to 65535");
  require(head_dim >= 1 && head_dim <= 256 && head_dim % piece == 0,
          "decode_attention: head_dim must be from 1 to 256 and fill pieces of 16 bytes");
  check_sizes({batch, n_heads, max_len, head_dim}, what);
  check_sizes({batch, n_heads, splits, 2 + head_dim}, what);
  for (int i = 0; i < 8; ++i) {
    require(strides[i] % piece == 0, "decode_attention: strides must be multiples of 16 bytes");
    check_sizes({i < 2 ? (i == 0 ? batch : n_heads) : sizes[(i - 2) % 3], strides[i], 8}, what);
  }
  for (Address address : {q, k, v}) require(address % 16 == 0, "decode_attention: inputs must be aligned to 16 bytes");
  const int64_t heads = batch * n_heads, cached = heads * max_len * head_dim;
  if (heads == 0) return;
  const cuda::DecodeCall call = {batch, n_heads, max_len, head_dim, splits, softmax_scale, dtype, to_stream(stream)};
  check_launch(cuda::decode_attention(pointer(out, heads * head_dim, size, what), float_pointer(partial, heads, what),
                                      {pointer(q, heads, size, what), strides[0], strides[1], 0},
                                      {pointer(k, cached, size, what), strides[2], strides[3], strides[4]},
                                      {pointer(v, cached, size, what), strides[5], strides[6], strides[7]},
                                      static_cast<const int64_t*>(pointer(lengths, batch, 8, what)), call),
               what);
}

}  // namespace
}  // namespace fastgpt

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of fastgpt. Use fastgpt.ops: it checks shapes, dtypes, devices and lifetimes.";
  module.def("gelu_forward", &fastgpt::gelu_forward);
  module.def("gelu_backward", &fastgpt::gelu_backward);
  module.def("layer_norm_forward", &fastgpt::layer_norm_forward);
  module.def("layer_norm_backward", &fastgpt::layer_norm_backward);
  module.def("attention_forward", &fastgpt::attention_forward<fastgpt::cuda::attention_forward>);
  module.def("attention_forward_hopper", &fastgpt::attention_forward<fastgpt::cuda::attention_forward_hopper>);
  module.def("attention_backward", &fastgpt::attention_backward<fastgpt::cuda::attention_backward>);
  module.def("attention_backward_hopper", &fastgpt::attention_backward<fastgpt::cuda::attention_backward_hopper>);
  module.def("decode_attention", &fastgpt::decode_attention);
  fastgpt::bind_cuda_decoder(module);
  fastgpt::bind_cuda_rows(module);
  fastgpt::bind_cuda_cross_entropy(module);
}
