// fastgpt._cpu: the CPU kernels. It links no PyTorch: tensors come as addresses, sizes and strides.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "cpu_isa.h"

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of fastgpt. Use fastgpt.ops: it checks shapes, dtypes and lifetimes.";
  module.def("isa", [] { return std::string(fastgpt::kernels().isa); }, "The instruction set in use.");
  module.def("available_isas", &fastgpt::available_isas, "Instruction sets of this processor and build, best first.");
  module.def("cpu_vendor", &fastgpt::cpu_vendor, "The maker of this processor: amd, intel or other.");
  module.def("select_isa", &fastgpt::select_isa, "Use this instruction set from now on.");
#ifdef _OPENMP
  module.attr("openmp") = true;
#else
  module.attr("openmp") = false;
#endif
  fastgpt::bind_attention(module);
  fastgpt::bind_block(module);
  fastgpt::bind_cross_entropy(module);
  fastgpt::bind_decode_attention(module);
  fastgpt::bind_decoder(module);
  fastgpt::bind_draw(module);
  fastgpt::bind_dropout_add_layer_norm(module);
  fastgpt::bind_embedding(module);
  fastgpt::bind_fast_head(module);
  fastgpt::bind_gelu(module);
  fastgpt::bind_gemm(module);
  fastgpt::bind_layer_norm(module);
}
