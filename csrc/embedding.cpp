// Bindings of kernels/cpu/embedding.h.
#include <memory>
#include <string>
#include <vector>

#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"

namespace fastgpt {
namespace {

const int64_t* check_ids(Address address, int64_t count, int64_t vocab_size, const char* what) {
  const int64_t* ids = static_cast<const int64_t*>(pointer(address, count, sizeof(int64_t), what));
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= vocab_size)
      refuse<pybind11::index_error>(what, ": id ", ids[i], " is outside the vocabulary of ", vocab_size);
  return ids;
}

std::unique_ptr<float[]> workspace(int64_t n, int num_threads, const char* what) {
  check_sizes({check_threads(num_threads), 8, n}, what);
  return std::unique_ptr<float[]>(new float[num_threads * kernels().embedding_floats(n)]);
}

void embedding_forward(Address out, Address ids, Address weight, Address position, int64_t batch, int64_t n_tokens,
                       int64_t n, int64_t vocab_size, int64_t context_length, uint64_t seed, int32_t dropout_threshold,
                       int dtype_code, int num_threads) {
  const char* what = "embedding_forward";
  const DType dtype = to_dtype(dtype_code, what);
  check_sizes({batch, n_tokens, n}, what);
  check_sizes({vocab_size, n}, what);
  check_sizes({context_length, n}, what);
  require(n_tokens <= context_length, "embedding_forward: more tokens than positions");
  const int64_t size = dtype_size(dtype);
  const std::unique_ptr<float[]> floats = workspace(n, num_threads, what);
  const EmbeddingForwardArgs args = {pointer(out, batch * n_tokens * n, size, what),
                                     check_ids(ids, batch * n_tokens, vocab_size, what),
                                     pointer(weight, vocab_size * n, size, what),
                                     pointer(position, context_length * n, size, what),
                                     floats.get(),
                                     batch,
                                     n_tokens,
                                     n,
                                     seed,
                                     check_threshold(dropout_threshold, what),
                                     dtype,
                                     num_threads};
  pybind11::gil_scoped_release release;
  kernels().embedding_forward(args);
}

void embedding_backward(Address dweight, Address dposition, Address dout, Address ids_address, int64_t batch,
                        int64_t n_tokens, int64_t n, int64_t vocab_size, int64_t context_length, uint64_t seed,
                        int32_t dropout_threshold, int dtype_code, int num_threads) {
  const char* what = "embedding_backward";
  const DType dtype = to_dtype(dtype_code, what);
  check_sizes({batch, n_tokens, n}, what);
  check_sizes({vocab_size, n}, what);
  check_sizes({context_length, n}, what);
  require(n_tokens <= context_length, "embedding_backward: more tokens than positions");
  check_sizes({batch, n_tokens}, what);
  const int64_t size = dtype_size(dtype), tokens = batch * n_tokens;
  const int64_t* ids = check_ids(ids_address, tokens, vocab_size, what);
  const std::unique_ptr<float[]> floats = workspace(n, num_threads, what);
  // The chain of each id, built from its end.
  std::vector<int64_t> first(vocab_size, -1), next(tokens);
  for (int64_t row = tokens - 1; row >= 0; --row) {
    next[row] = first[ids[row]];
    first[ids[row]] = row;
  }
  const EmbeddingBackwardArgs args = {pointer(dweight, vocab_size * n, size, what),
                                      pointer(dposition, context_length * n, size, what),
                                      pointer(dout, tokens * n, size, what),
                                      first.data(),
                                      next.data(),
                                      floats.get(),
                                      batch,
                                      n_tokens,
                                      n,
                                      vocab_size,
                                      context_length,
                                      seed,
                                      check_threshold(dropout_threshold, what),
                                      dtype,
                                      num_threads};
  pybind11::gil_scoped_release release;
  kernels().embedding_backward(args);
}

}  // namespace

void bind_embedding(pybind11::module_& module) {
  module.def("embedding_forward", &embedding_forward);
  module.def("embedding_backward", &embedding_backward);
}

}  // namespace fastgpt
