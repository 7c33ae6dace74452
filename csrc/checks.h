// Checks that memory safety needs. The Python side of the door has checked shapes and types; here nothing is trusted
// that a kernel turns into an address.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <string>

#include "../kernels/cpu/table.h"

namespace fastgpt {

// A tensor's address as Python passes it: tensor.data_ptr().
using Address = uintptr_t;

template <typename Error, typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

// The message is text and numbers, put together only where the check fails: a call checks dozens of things.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) refuse<pybind11::value_error>(parts...);
}

inline int64_t multiply(int64_t a, int64_t b, const char* what) {
  int64_t product = 0;
  require(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &product), what, ": sizes ", a, " x ", b,
          " are negative or too large");
  return product;
}

// The sizes of one tensor: none negative, and their product times 8 bytes fits an address.
inline void check_sizes(std::initializer_list<int64_t> sizes, const char* what) {
  int64_t bytes = 8;
  for (int64_t size : sizes) bytes = multiply(bytes, size, what);
}

inline DType to_dtype(int code, const char* what) {
  require(code == 0 || code == 1, what, ": unknown dtype code ", code);
  return static_cast<DType>(code);
}

inline int64_t dtype_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// An address of count elements: not null unless count is 0, and aligned to the element.
inline void* pointer(Address address, int64_t count, int64_t element_size, const char* what) {
  require(count == 0 || address != 0, what, ": null pointer");
  require(address % element_size == 0, what, ": misaligned pointer");
  return reinterpret_cast<void*>(address);
}

inline float* float_pointer(Address address, int64_t count, const char* what) {
  return static_cast<float*>(pointer(address, count, sizeof(float), what));
}

inline int32_t check_threshold(int32_t threshold, const char* what) {
  require(threshold >= 0 && threshold <= 65536, what, ": dropout_threshold must be from 0 to 65536");
  return threshold;
}

inline int check_threads(int num_threads) {
  require(num_threads >= 1 && num_threads <= 4096, "num_threads must be from 1 to 4096");
  return num_threads;
}

}  // namespace fastgpt
