// Bindings of kernels/cpu/draw.h for logits that are there already; csrc/decoder.cpp draws inside its steps.
#include "bindings.h"
#include "checks.h"
#include "cpu_isa.h"
#include "draw_options.h"

namespace fastgpt {
namespace {

// tokens (count) from logits (count, n), for the rows 0 .. count - 1 of a batch.
void draw_tokens(Address tokens, Address logits, int64_t count, int64_t n, float inverse_temperature, int64_t top_k,
                 double top_p, uint64_t seed, int64_t drawn, int num_threads) {
  const char* what = "draw_tokens";
  check_sizes({count, n}, what);
  require(n >= 1 && n <= (int64_t{1} << 31), "draw_tokens: there must be from 1 to 2^31 logits");
  DrawArgs args{};
  args.tokens = static_cast<int64_t*>(pointer(tokens, count, sizeof(int64_t), what));
  args.logits = float_pointer(logits, count * n, what);
  args.options = draw_options(inverse_temperature, top_k, top_p, seed, drawn, n);
  args.count = count, args.n = n;
  args.num_threads = check_threads(num_threads);
  DrawRoom room;
  args.workspace = room.of(count, n, args.options, num_threads);
  std::vector<int64_t> rows(count);
  for (int64_t i = 0; i < count; ++i) rows[i] = i;
  args.rows = rows.data();
  pybind11::gil_scoped_release release;
  kernels().draw_tokens(args);
}

}  // namespace

void bind_draw(pybind11::module_& module) { module.def("draw_tokens", &draw_tokens); }

}  // namespace fastgpt
