// Bindings of kernels/cpu/attention.h.
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <new>

#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

// As tensor.stride() gives them.
using Strides = std::array<int64_t, 4>;

// A (batch, n_heads, len, head_dim) tensor whose every element lies within an address space.
HeadsRef heads_ref(Address address, const Strides& strides, const AttentionSizes& s, int64_t len, DType dtype,
                   const char* what) {
  check_sizes({s.batch, strides[0], 8}, what);
  check_sizes({s.n_heads, strides[1], 8}, what);
  check_sizes({len, strides[2], 8}, what);
  check_sizes({s.batch, s.n_heads, len, s.head_dim}, what);
  const int64_t count = s.batch * s.n_heads * len * s.head_dim;
  require(strides[3] == 1 || s.head_dim == 1 || count == 0, what, ": the last axis must be contiguous");
  return {pointer(address, count, dtype_size(dtype), what), strides[0], strides[1], strides[2]};
}

AttentionSizes check_attention_sizes(const std::array<int64_t, 5>& sizes, int num_threads, const char* what) {
  const AttentionSizes s = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  require(s.head_dim >= 1 && s.head_dim <= kMaxHeadDim, what, ": head_dim must be from 1 to 256");
  require(s.q_len >= 0 && s.q_len <= s.k_len, what, ": q_len must be from 0 to k_len");
  // The workspace has at most 12 sums and 5 copies of a head for each thread.
  check_sizes({s.k_len, 1024, check_threads(num_threads), 32}, what);
  return s;
}

struct AlignedDelete {
  void operator()(float* p) const { operator delete[](p, std::align_val_t{64}); }
};
using Workspace = std::unique_ptr<float[], AlignedDelete>;

Workspace make_workspace(int64_t floats) { return Workspace(new (std::align_val_t{64}) float[floats]); }

void attention_forward(Address out, const Strides& out_strides, Address lse, Address q, const Strides& q_strides,
                       Address k, const Strides& k_strides, Address v, const Strides& v_strides,
                       const std::array<int64_t, 5>& sizes, float softmax_scale, uint64_t seed,
                       int32_t dropout_threshold, int dtype_code, int num_threads) {
  const char* what = "attention_forward";
  const DType dtype = to_dtype(dtype_code, what);
  const AttentionSizes s = check_attention_sizes(sizes, num_threads, what);
  AttentionForwardArgs args = {heads_ref(out, out_strides, s, s.q_len, dtype, what),
                               nullptr,
                               heads_ref(q, q_strides, s, s.q_len, dtype, what),
                               heads_ref(k, k_strides, s, s.k_len, dtype, what),
                               heads_ref(v, v_strides, s, s.k_len, dtype, what),
                               s,
                               softmax_scale,
                               seed,
                               check_threshold(dropout_threshold, what),
                               dtype,
                               num_threads,
                               nullptr};
  args.lse = float_pointer(lse, s.batch * s.n_heads * s.q_len, what);
  if (s.batch * s.n_heads * s.q_len == 0) return;
  pybind11::gil_scoped_release release;
  const Workspace workspace = make_workspace(kernels().attention_forward_floats(s, dtype, num_threads));
  args.workspace = workspace.get();
  kernels().attention_forward(args);
}

void attention_backward(Address dq, const Strides& dq_strides, Address dk, const Strides& dk_strides, Address dv,
                        const Strides& dv_strides, Address dout, const Strides& dout_strides, Address q,
                        const Strides& q_strides, Address k, const Strides& k_strides, Address v,
                        const Strides& v_strides, Address out, const Strides& out_strides, Address lse,
                        const std::array<int64_t, 5>& sizes, float softmax_scale, uint64_t seed,
                        int32_t dropout_threshold, int dtype_code, int num_threads) {
  const char* what = "attention_backward";
  const DType dtype = to_dtype(dtype_code, what);
  const AttentionSizes s = check_attention_sizes(sizes, num_threads, what);
  AttentionBackwardArgs args = {heads_ref(dq, dq_strides, s, s.q_len, dtype, what),
                                heads_ref(dk, dk_strides, s, s.k_len, dtype, what),
                                heads_ref(dv, dv_strides, s, s.k_len, dtype, what),
                                heads_ref(dout, dout_strides, s, s.q_len, dtype, what),
                                heads_ref(q, q_strides, s, s.q_len, dtype, what),
                                heads_ref(k, k_strides, s, s.k_len, dtype, what),
                                heads_ref(v, v_strides, s, s.k_len, dtype, what),
                                heads_ref(out, out_strides, s, s.q_len, dtype, what),
                                nullptr,
                                s,
                                softmax_scale,
                                seed,
                                check_threshold(dropout_threshold, what),
                                dtype,
                                num_threads,
                                nullptr};
  args.lse = float_pointer(lse, s.batch * s.n_heads * s.q_len, what);
  if (s.batch * s.n_heads * s.k_len == 0) return;
  pybind11::gil_scoped_release release;
  const Workspace workspace = make_workspace(kernels().attention_backward_floats(s, dtype, num_threads));
  args.workspace = workspace.get();
  kernels().attention_backward(args);
}

}  // namespace

void bind_attention(pybind11::module_& module) {
  module.def("attention_forward", &attention_forward);
  module.def("attention_backward", &attention_backward);
}

}  // namespace fastgpt
