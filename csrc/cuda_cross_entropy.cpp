// Binding of the cross-entropy of logits in place.
#include <pybind11/pybind11.h>

#include "checks.h"
#include "cuda_bindings.h"

namespace fastgpt {
namespace {

void cross_entropy(Address losses, Address logits, Address targets, Address count, int64_t rows, int64_t padded,
                   int64_t vocab_size, int64_t ignore_index, bool gradient, int dtype_code, Address stream) {
  const char* what = "cross_entropy";
  require(dtype_code >= 0 && dtype_code <= 2, "cross_entropy: unknown dtype code");
  require(rows >= 0 && rows <= 0x7fffffff, "cross_entropy: rows must be from 0 to 2**31 - 1");
  require(padded % 8 == 0 && padded <= 1 << 30, "cross_entropy: rows must be a multiple of 8 numbers, at most 2**30");
  require(vocab_size >= 1 && vocab_size <= padded, "cross_entropy: the vocabulary must be from 1 to the row's length");
  require(logits % 16 == 0, "cross_entropy: logits must be aligned to 16 bytes");
  check_sizes({rows, padded}, what);
  const cuda::CrossEntropyCall call = {rows,
                                       padded,
                                       vocab_size,
                                       ignore_index,
                                       gradient,
                                       static_cast<cuda::DType>(dtype_code),
                                       reinterpret_cast<void*>(stream)};
  check_launch(cuda::cross_entropy(float_pointer(losses, rows, what), pointer(logits, rows, 2, what),
                                   static_cast<const int64_t*>(pointer(targets, rows, 8, what)),
                                   static_cast<const int64_t*>(pointer(count, 1, 8, what)), call),
               what);
}

}  // namespace

void bind_cuda_cross_entropy(pybind11::module_& module) { module.def("cross_entropy", &cross_entropy); }

}  // namespace fastgpt
