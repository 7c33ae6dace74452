// Bindings of kernels/cpu/decode_attention.h.
#include <algorithm>
#include <memory>
#include <string>

#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

// The last address of a cache, so that no stride can lead outside what an address can hold.
void check_strides(int64_t batch, int64_t n_heads, int64_t max_len, int64_t s0, int64_t s1, int64_t s2) {
  check_sizes({batch, s0}, "decode_attention");
  check_sizes({n_heads, s1}, "decode_attention");
  check_sizes({max_len, s2}, "decode_attention");
}

const int64_t* check_lengths(Address address, int64_t batch, int64_t max_len) {
  const auto* lengths = static_cast<const int64_t*>(pointer(address, batch, sizeof(int64_t), "decode_attention"));
  for (int64_t row = 0; row < batch; ++row)
    require(lengths[row] >= 1 && lengths[row] <= max_len, "decode_attention: lengths[", row, "] is ", lengths[row],
            "; a row needs from 1 to max_len = ", max_len, " keys.");
  return lengths;
}

void decode_attention(Address out, Address q, Address k, Address v, Address lengths, int64_t batch, int64_t n_heads,
                      int64_t max_len, int64_t head_dim, int64_t q0, int64_t q1, int64_t k0, int64_t k1, int64_t k2,
                      int64_t v0, int64_t v1, int64_t v2, float softmax_scale, int dtype_code, int num_threads) {
  const char* what = "decode_attention";
  const DType dtype = to_dtype(dtype_code, what);
  require(head_dim >= 1 && head_dim <= kMaxHeadDim, "decode_attention: head_dim must be from 1 to 256");
  check_sizes({batch, n_heads, max_len, head_dim}, what);
  check_strides(batch, n_heads, 1, q0, q1, 0);
  check_strides(batch, n_heads, max_len, k0, k1, k2);
  check_strides(batch, n_heads, max_len, v0, v1, v2);
  const int64_t* checked_lengths = check_lengths(lengths, batch, max_len);
  check_threads(num_threads);
  const int64_t count = batch * n_heads * head_dim, size = dtype_size(dtype);
  const std::unique_ptr<float[]> partial(new float[2 * num_threads * (head_dim + 2)]);
  const std::unique_ptr<int64_t[]> partial_head(new int64_t[2 * num_threads]);
  const DecodeAttentionArgs args = {pointer(out, count, size, what),
                                    pointer(q, count, size, what),
                                    pointer(k, count * max_len, size, what),
                                    pointer(v, count * max_len, size, what),
                                    checked_lengths,
                                    partial.get(),
                                    partial_head.get(),
                                    batch,
                                    n_heads,
                                    head_dim,
                                    {q0, q1},
                                    {k0, k1, k2},
                                    {v0, v1, v2},
                                    softmax_scale,
                                    dtype,
                                    num_threads};
  if (count == 0) return;
  pybind11::gil_scoped_release release;
  kernels().decode_attention(args);
}

}  // namespace

void bind_decode_attention(pybind11::module_& module) { module.def("decode_attention", &decode_attention); }

}  // namespace fastgpt
