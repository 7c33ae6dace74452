// Bindings of kernels/cpu/cross_entropy.h.
#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

const int64_t* target_pointer(Address targets, int64_t rows, const char* what) {
  return static_cast<const int64_t*>(pointer(targets, rows, sizeof(int64_t), what));
}

// How many rows count. Every target must be in the vocabulary, or ignored.
int64_t count_targets(Address address, int64_t rows, int64_t vocab_size, int64_t ignore_index) {
  const char* what = "cross_entropy";
  check_sizes({rows}, what);
  const int64_t* targets = target_pointer(address, rows, what);
  int64_t count = 0;
  for (int64_t row = 0; row < rows; ++row) {
    if (targets[row] == ignore_index) continue;
    if (targets[row] < 0 || targets[row] >= vocab_size)
      refuse<pybind11::index_error>(what, ": target ", targets[row], " is outside the vocabulary of ", vocab_size);
    ++count;
  }
  return count;
}

void cross_entropy(Address losses, Address logits, Address targets, int64_t rows, int64_t vocab_size,
                   int64_t ignore_index, float scale, bool gradient, int dtype_code, int num_threads) {
  const char* what = "cross_entropy";
  const DType dtype = to_dtype(dtype_code, what);
  check_sizes({rows, vocab_size}, what);
  const CrossEntropyArgs args = {float_pointer(losses, rows, what),
                                 pointer(logits, rows * vocab_size, dtype_size(dtype), what),
                                 target_pointer(targets, rows, what),
                                 rows,
                                 vocab_size,
                                 ignore_index,
                                 scale,
                                 gradient,
                                 dtype,
                                 check_threads(num_threads)};
  count_targets(targets, rows, vocab_size, ignore_index);
  pybind11::gil_scoped_release release;
  kernels().cross_entropy(args);
}

}  // namespace

void bind_cross_entropy(pybind11::module_& module) {
  module.def("count_targets", &count_targets);
  module.def("cross_entropy", &cross_entropy);
}

}  // namespace fastgpt
