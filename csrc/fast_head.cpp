// Bindings of the copy that kernels/cpu/fast_head.h makes of a head; csrc/decoder.cpp uses it.
#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"
#include "head_screen.h"

namespace fastgpt {
namespace {

void screen_rows(Address rows, Address stats, Address weight, int64_t n_out, int64_t n_in, int num_threads) {
  const char* what = "screen_rows";
  check_screen_width(n_in);
  check_sizes({n_out, n_in + kScreenUnit}, what);
  const int64_t stride = (n_in + kScreenUnit - 1) / kScreenUnit * kScreenUnit;
  const ScreenRowsArgs args = {static_cast<int8_t*>(pointer(rows, n_out * stride, 1, what)),
                               float_pointer(stats, n_out * kScreenStats, what),
                               float_pointer(weight, n_out * n_in, what),
                               n_out,
                               n_in,
                               check_threads(num_threads)};
  pybind11::gil_scoped_release release;
  kernels().screen_rows(args);
}

}  // namespace

void bind_fast_head(pybind11::module_& module) { module.def("screen_rows", &screen_rows); }

}  // namespace fastgpt
