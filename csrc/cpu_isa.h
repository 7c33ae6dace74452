// The choice of an instruction set at run time.
#pragma once

#include <string>
#include <vector>

#include "../kernels/cpu/table.h"

namespace fastgpt {

// The kernels in use: the best instruction set that the processor has, or the selected one.
const KernelTable& kernels();

// Names of the instruction sets that were compiled and that this processor has, best first.
std::vector<std::string> available_isas();

// "amd", "intel" or "other": what other libraries do with a processor depends on its maker.
std::string cpu_vendor();

// Throws std::invalid_argument when the processor or the build lacks it.
void select_isa(const std::string& name);

}  // namespace fastgpt
