// Which instruction sets were compiled, which of them this processor has, and which one is in use.
#include "cpu_isa.h"

#include <stdexcept>

namespace fastgpt {

namespace baseline {
extern const KernelTable kTable;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}
namespace avx512_vnni {
extern const KernelTable kTable;
}
namespace avx512_bf16 {
extern const KernelTable kTable;
}
#endif

namespace {

struct Isa {
  const KernelTable* table;
  bool supported;
};

// Best first.
std::vector<Isa> all() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  const bool has_bf16 = has_vnni && __builtin_cpu_supports("avx512bf16");
  return {{&avx512_bf16::kTable, has_bf16},
          {&avx512_vnni::kTable, has_vnni},
          {&avx512::kTable, has_avx512},
          {&avx2::kTable, has_avx2},
          {&baseline::kTable, true}};
#else
  return {{&baseline::kTable, true}};
#endif
}

const KernelTable* best() {
  for (const Isa& isa : all())
    if (isa.supported) return isa.table;
  return nullptr;
}

const KernelTable*& current() {
  static const KernelTable* table = best();
  return table;
}

}  // namespace

const KernelTable& kernels() { return *current(); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : all())
    if (isa.supported) names.push_back(isa.table->isa);
  return names;
}

std::string cpu_vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}

void select_isa(const std::string& name) {
  std::string known;
  for (const Isa& isa : all()) {
    if (isa.supported && name == isa.table->isa) {
      current() = isa.table;
      return;
    }
    if (isa.supported) known += (known.empty() ? "" : ", ") + std::string(isa.table->isa);
  }
  throw std::invalid_argument("this processor and build have no instruction set '" + name + "'; they have: " + known);
}

}  // namespace fastgpt
