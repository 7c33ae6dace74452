// Bindings of the kernels on aligned rows: norm with dropout and residual, GELU with bias.
#include "cuda_rows.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>

#include "checks.h"
#include "cuda_bindings.h"

namespace fastgpt {
namespace {

// rows, n, parts, dtype code, dtype code of the weight.
using Sizes = std::array<int64_t, 5>;

cuda::RowsCall rows_call(const Sizes& sizes, uint64_t seed, int64_t threshold, Address stream, int64_t most,
                         const char* what) {
  const auto [rows, n, parts, dtype, weight_dtype] = sizes;
  const std::string name = what;
  require(n >= 8 && n <= most && n % 8 == 0,
          name + ": n must be a multiple of 8 from 8 to " + std::to_string(most) + ", not " + std::to_string(n));
  require(parts >= 1 && parts <= 65535, name + ": parts must be from 1 to 65535");
  require(dtype >= 0 && dtype <= 2 && weight_dtype >= 0 && weight_dtype <= 2, name + ": unknown dtype code");
  require(weight_dtype == 0 || weight_dtype == dtype, name + ": the weight must be float32 or as x");
  require(threshold >= 0 && threshold <= 65536, name + ": dropout_threshold must be from 0 to 65536");
  check_sizes({rows, n}, what);
  check_sizes({parts, 2, n}, what);
  return {rows,
          n,
          static_cast<int>(parts),
          seed,
          static_cast<uint32_t>(threshold),
          static_cast<cuda::DType>(dtype),
          static_cast<cuda::DType>(weight_dtype),
          reinterpret_cast<void*>(stream)};
}

// Rows that lie `stride` elements apart; null where it may be.
void* aligned(Address address, int64_t stride, const cuda::RowsCall& call, const char* what, bool optional = false) {
  check_sizes({call.rows, stride}, what);
  require(optional || call.rows == 0 || address != 0, std::string(what) + ": null pointer");
  require(address % 16 == 0 && stride % 8 == 0,
          std::string(what) + ": rows must be aligned to 16 bytes, with strides that are multiples of 8");
  return reinterpret_cast<void*>(address);
}

void* vector_of(Address address, const char* what) {
  require(address != 0 && address % 16 == 0, std::string(what) + ": weights must be aligned to 16 bytes");
  return reinterpret_cast<void*>(address);
}

void row_norm_forward(Address out, Address total, Address mean, Address rstd, Address x, Address residual,
                      Address weight, Address bias, int64_t x_stride, int64_t residual_stride, const Sizes& sizes,
                      float eps, uint64_t seed, int64_t threshold, Address stream) {
  const char* what = "row_norm_forward";
  const cuda::RowsCall call = rows_call(sizes, seed, threshold, stream, cuda::kMostNormed, what);
  require((total == 0) == (residual == 0), "row_norm_forward: total and residual come together");
  require(threshold == 0 || residual != 0 || call.rows == 0, "row_norm_forward: dropout needs a residual");
  check_launch(
      cuda::row_norm_forward(aligned(out, call.n, call, what), aligned(total, call.n, call, what, true),
                             float_pointer(mean, call.rows, what), float_pointer(rstd, call.rows, what),
                             aligned(x, x_stride, call, what), aligned(residual, residual_stride, call, what, true),
                             vector_of(weight, what), vector_of(bias, what), x_stride, residual_stride, eps, call),
      what);
}

void row_norm_backward(Address dx, Address dresidual, Address dweight, Address dbias, Address partial, Address dtotal,
                       Address dout, Address total, Address weight, Address mean, Address rstd, int64_t dtotal_stride,
                       int64_t dout_stride, int64_t total_stride, const Sizes& sizes, uint64_t seed, int64_t threshold,
                       Address stream) {
  const char* what = "row_norm_backward";
  const cuda::RowsCall call = rows_call(sizes, seed, threshold, stream, cuda::kMostNormed, what);
  check_launch(
      cuda::row_norm_backward(
          aligned(dx, call.n, call, what, true), aligned(dresidual, call.n, call, what), vector_of(dweight, what),
          vector_of(dbias, what), static_cast<float*>(vector_of(partial, what)),
          aligned(dtotal, dtotal_stride, call, what, true), aligned(dout, dout_stride, call, what),
          aligned(total, total_stride, call, what), vector_of(weight, what), float_pointer(mean, call.rows, what),
          float_pointer(rstd, call.rows, what), dtotal_stride, dout_stride, total_stride, call),
      what);
}

void bias_gelu_forward(Address out, Address x, Address bias, const Sizes& sizes, Address stream) {
  const char* what = "bias_gelu_forward";
  const cuda::RowsCall call = rows_call(sizes, 0, 0, stream, int64_t{1} << 30, what);
  check_launch(cuda::bias_gelu_forward(aligned(out, call.n, call, what), aligned(x, call.n, call, what),
                                       vector_of(bias, what), call),
               what);
}

void bias_gelu_backward(Address dx, Address dbias, Address partial, Address dout, Address x, Address bias,
                        const Sizes& sizes, Address stream) {
  const char* what = "bias_gelu_backward";
  const cuda::RowsCall call = rows_call(sizes, 0, 0, stream, int64_t{1} << 30, what);
  check_launch(
      cuda::bias_gelu_backward(aligned(dx, call.n, call, what), vector_of(dbias, what),
                               static_cast<float*>(vector_of(partial, what)), aligned(dout, call.n, call, what),
                               aligned(x, call.n, call, what), vector_of(bias, what), call),
      what);
}

}  // namespace

void bind_cuda_rows(pybind11::module_& module) {
  module.def("row_norm_forward", &row_norm_forward);
  module.def("row_norm_backward", &row_norm_backward);
  module.def("bias_gelu_forward", &bias_gelu_forward);
  module.def("bias_gelu_backward", &bias_gelu_backward);
}

}  // namespace fastgpt
