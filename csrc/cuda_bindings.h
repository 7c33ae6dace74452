// What the binding files of fastgpt._cuda share.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "cuda_launch.h"

namespace fastgpt {

void bind_cuda_decoder(pybind11::module_& module);
void bind_cuda_rows(pybind11::module_& module);
void bind_cuda_cross_entropy(pybind11::module_& module);

// A launch error as an exception that names the op.
inline void check_launch(int error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string(what) + ": CUDA says: " + cuda::error_text(error));
}

}  // namespace fastgpt
