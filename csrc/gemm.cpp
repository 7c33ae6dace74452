// Bindings of kernels/cpu/gemm.h.
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <new>

#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

using Strides = std::array<int64_t, 2>;

// A (rows, columns) matrix whose every element lies within an address space.
MatrixRef matrix_ref(Address address, const Strides& strides, int64_t rows, int64_t columns, int dtype_code,
                     const char* what) {
  const DType dtype = to_dtype(dtype_code, what);
  check_sizes({rows, strides[0], 8}, what);
  check_sizes({columns, strides[1], 8}, what);
  check_sizes({rows, columns}, what);
  return {pointer(address, rows * columns, dtype_size(dtype), what), strides[0], strides[1], dtype};
}

struct AlignedDelete {
  void operator()(float* p) const { operator delete[](p, std::align_val_t{64}); }
};

// The panels of the last product, kept for the next: fresh memory would cost a page fault every 4 KiB.
float* workspace(int64_t floats) {
  thread_local std::unique_ptr<float[], AlignedDelete> kept;
  thread_local int64_t size = 0;
  if (floats > size) {
    size = 0;
    kept.reset();
    kept.reset(new (std::align_val_t{64}) float[floats]);
    size = floats;
  }
  return kept.get();
}

// c (m, n) = a (m, k) b (k, n), plus bias (n), plus c when accumulate; row_sums (m) takes the sums of the rows of a.
void gemm(Address c, const Strides& c_strides, int c_dtype, Address a, const Strides& a_strides, int a_dtype, Address b,
          const Strides& b_strides, int b_dtype, const std::array<int64_t, 3>& sizes, Address bias, Address row_sums,
          bool accumulate, int num_threads) {
  const char* what = "gemm";
  const auto [m, n, k] = sizes;
  const MatrixRef out = matrix_ref(c, c_strides, m, n, c_dtype, what);
  require(c_strides[1] == 1 || n <= 1 || m == 0, "gemm: the rows of c must be contiguous");
  require(c_strides[0] >= n || m <= 1, "gemm: the rows of c must not overlap");
  GemmArgs args = {const_cast<void*>(out.data),
                   row_sums ? float_pointer(row_sums, m, what) : nullptr,
                   matrix_ref(a, a_strides, m, k, a_dtype, what),
                   matrix_ref(b, b_strides, k, n, b_dtype, what),
                   bias ? float_pointer(bias, n, what) : nullptr,
                   m,
                   n,
                   k,
                   c_strides[0],
                   accumulate,
                   out.dtype,
                   check_threads(num_threads),
                   nullptr};
  pybind11::gil_scoped_release release;
  args.workspace = workspace(kernels().gemm_floats(args));
  kernels().gemm(args);
}

}  // namespace

void bind_gemm(pybind11::module_& module) { module.def("gemm", &gemm); }

}  // namespace fastgpt
