// One function per op: it adds the op's kernels to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace fastgpt {

void bind_attention(pybind11::module_& module);
void bind_block(pybind11::module_& module);
void bind_cross_entropy(pybind11::module_& module);
void bind_decode_attention(pybind11::module_& module);
void bind_decoder(pybind11::module_& module);
void bind_draw(pybind11::module_& module);
void bind_dropout_add_layer_norm(pybind11::module_& module);
void bind_embedding(pybind11::module_& module);
void bind_fast_head(pybind11::module_& module);
void bind_gelu(pybind11::module_& module);
void bind_gemm(pybind11::module_& module);
void bind_layer_norm(pybind11::module_& module);

}  // namespace fastgpt
