// Bindings of kernels/cpu/cross_entropy.h.
#include <string>

#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

void cross_entropy(Address losses, Address logits, Address targets, int64_t rows, int64_t vocab_size,
                   int64_t ignore_index, float scale, bool gradient, int dtype_code, int num_threads) {
  const char* what = "cross_entropy";
  const DType dtype = to_dtype(dtype_code, what);
  check_sizes({rows, vocab_size}, what);
  const CrossEntropyArgs args = {float_pointer(losses, rows, what),
                                 pointer(logits, rows * vocab_size, dtype_size(dtype), what),
                                 static_cast<const int64_t*>(pointer(targets, rows, sizeof(int64_t), what)),
                                 rows,
                                 vocab_size,
                                 ignore_index,
                                 scale,
                                 gradient,
                                 dtype,
                                 check_threads(num_threads)};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = args.targets[row];
    require(target == ignore_index || (target >= 0 && target < vocab_size),
            std::string(what) + ": a target is outside the vocabulary");
  }
  pybind11::gil_scoped_release release;
  kernels().cross_entropy(args);
}

}  // namespace

void bind_cross_entropy(pybind11::module_& module) { module.def("cross_entropy", &cross_entropy); }

}  // namespace fastgpt
