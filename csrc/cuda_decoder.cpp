// Bindings of the decode step: addresses of live weights and of the buffers that a captured graph goes on using.
#include "cuda_decoder.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <vector>

#include "checks.h"
#include "cuda_bindings.h"

namespace fastgpt {
namespace {

// In this order: weight and bias of norm1, query, key, value, projection, norm2, widen, narrow; keys, values.
using LayerAddresses = std::array<Address, 18>;
// batch, emb_dim, n_heads, head_dim, hidden_dim, n_logits, vocab_size, context, max_len, batch_stride, head_stride,
// row_stride, splits, most_blocks, most_shared, group.
using Sizes = std::array<int64_t, 16>;
// norm weight, norm bias, head, head bias, tok_emb, pos_emb; x, queries, attended, hidden, partial, arrived, best,
// logits, state, found, draw.
using Rest = std::array<Address, 17>;

void* whole(Address address, const char* what, bool optional = false) {
  require(optional || address != 0, std::string(what) + ": null pointer");
  require(address % 16 == 0, std::string(what) + ": weights and buffers must be aligned to 16 bytes");
  return reinterpret_cast<void*>(address);
}

cuda::DecoderSizes check_sizes_of(const Sizes& s, int64_t piece, const char* what) {
  const auto [batch, emb_dim, n_heads, head_dim, hidden_dim, n_logits, vocab_size, context, max_len, batch_stride,
              head_stride, row_stride, splits, most_blocks, most_shared, group] = s;
  const std::string name = what;
  for (int64_t size : s) require(size >= 1 && size < (int64_t{1} << 40), name + ": a size is not from 1 to 2**40 - 1");
  for (int64_t size : {emb_dim, hidden_dim, head_dim, batch_stride, head_stride, row_stride})
    require(size % piece == 0, name + ": widths and strides must fill pieces of 16 bytes");
  require(head_dim <= 256, name + ": head_dim must be at most 256");
  require(n_logits <= vocab_size, name + ": the head may not choose what the embedding does not have");
  require(max_len <= context, name + ": max_len must be at most the context");
  require(batch <= 65535 && group <= 65535 && splits <= 65535 && most_blocks <= 65535 && most_shared <= 1 << 20,
          name + ": batch, group, splits or most_blocks is above 65535");
  check_sizes({batch, n_heads, splits, 2 + head_dim}, what);
  check_sizes({batch, batch_stride}, what);
  check_sizes({vocab_size, emb_dim}, what);
  check_sizes({batch, n_logits}, what);
  for (int64_t count : {multiply(3, multiply(n_heads, head_dim, what), what), hidden_dim, emb_dim, n_logits,
                        multiply(multiply(batch, n_heads, what), splits, what)})
    require(count <= 0x7fffffff - 64, name + ": a size does not fit 32 bits");
  return {batch,        emb_dim,     n_heads,    head_dim, hidden_dim,  n_logits,    max_len,
          batch_stride, head_stride, row_stride, splits,   most_blocks, most_shared, group};
}

cuda::DecoderCall decoder_call(const std::vector<LayerAddresses>& layers, const std::vector<float>& eps,
                               const Rest& rest, const Sizes& sizes, int dtype_code, int mode, bool overlap) {
  const char* what = "decoder_step";
  require(dtype_code == 0 || dtype_code == 1, "decoder_step: the kernels take float32 and bfloat16");
  require(mode >= 0 && mode <= 2, "decoder_step: mode is 0 (likeliest), 1 (drawn) or 2 (drawn from the top_k)");
  require(eps.size() == 2 * layers.size() + 1, "decoder_step: eps must have two numbers a layer and one at the end");
  cuda::DecoderCall call = {};
  call.sizes = check_sizes_of(sizes, dtype_code == 0 ? 4 : 8, what);
  for (size_t i = 0; i < layers.size(); ++i) {
    const LayerAddresses& a = layers[i];
    const auto at = [&](int index, bool optional) { return whole(a[index], what, optional); };
    call.layers.push_back({at(0, false),
                           at(1, false),
                           at(10, false),
                           at(11, false),
                           {at(2, false), at(4, false), at(6, false)},
                           {at(3, true), at(5, true), at(7, true)},
                           at(8, false),
                           at(9, true),
                           at(12, false),
                           at(13, true),
                           at(14, false),
                           at(15, true),
                           at(16, false),
                           at(17, false),
                           eps[2 * i],
                           eps[2 * i + 1]});
  }
  const auto at = [&](int index, bool optional = false) { return whole(rest[index], what, optional); };
  call.norm_weight = at(0);
  call.norm_bias = at(1);
  call.head = at(2);
  call.head_bias = at(3, true);
  call.tok_emb = at(4);
  call.pos_emb = at(5);
  call.eps = eps.back();
  call.x = static_cast<float*>(at(6));
  call.queries = at(7);
  call.attended = at(8);
  call.hidden = at(9);
  call.partial = static_cast<float*>(at(10));
  call.arrived = static_cast<uint32_t*>(at(11));
  call.best = static_cast<uint64_t*>(at(12));
  call.logits = static_cast<float*>(at(13, mode != 2));
  call.state = static_cast<int64_t*>(at(14));
  call.found = static_cast<int64_t*>(at(15));
  call.draw = at(16);
  call.drawn = mode != 0;
  call.top_k = mode == 2;
  call.overlap = overlap;
  call.dtype = static_cast<cuda::DType>(dtype_code);
  return call;
}

// The call on this stream, when the persistent kernel can take it.
cuda::DecoderCall persistent_call(const cuda::DecoderCall& call, Address stream) {
  const cuda::DecoderSizes& s = call.sizes;
  require(s.batch == 1, "persistent decoder: batch must be 1, not " + std::to_string(s.batch));
  require(s.emb_dim <= cuda::kMostPersistentWidth, "persistent decoder: emb_dim must be at most " +
                                                       std::to_string(cuda::kMostPersistentWidth) + ", not " +
                                                       std::to_string(s.emb_dim));
  require(call.layers.size() <= 1024 && s.n_logits <= 1 << 24 && s.hidden_dim <= 1 << 20 && s.n_heads <= 4096,
          "persistent decoder: the network is larger than it can plan for");
  cuda::DecoderCall now = call;
  now.stream = reinterpret_cast<void*>(stream);
  return now;
}

// (blocks, stages); a value_error says why there is none.
std::array<int, 2> persistent_plan(const cuda::DecoderCall& call) {
  cuda::PersistentPlan plan = {};
  check_launch(cuda::persistent_plan(persistent_call(call, 0), &plan), "persistent_plan");
  require(plan.blocks > 0, "persistent decoder: this chip has no cooperative launches");
  require(plan.blocks <= call.sizes.most_blocks,
          "persistent decoder: the chip has more multiprocessors than the buffers have room for");
  require(plan.stages > 0, "persistent decoder: a block of this network does not fit into " +
                               std::to_string(call.sizes.most_shared) + " bytes of shared memory");
  return {plan.blocks, plan.stages};
}

void persistent_upload(const cuda::DecoderCall& call, Address table, int64_t bytes, Address stream) {
  require(bytes >= static_cast<int64_t>(call.layers.size()) * cuda::kLayerBytes,
          "persistent_upload: the table is too small");
  check_launch(cuda::persistent_upload(persistent_call(call, stream), whole(table, "persistent_upload")),
               "persistent_upload");
}

void persistent_steps(const cuda::DecoderCall& call, const std::array<int, 2>& plan, Address table, int steps,
                      int64_t end, Address stream) {
  require(plan[0] >= 1 && plan[0] <= call.sizes.most_blocks && plan[1] >= 1 && plan[1] <= 6,
          "persistent_steps: the plan is not that of persistent_plan");
  require(steps >= 1 && steps <= call.sizes.group, "persistent_steps: steps must be from 1 to the group");
  check_launch(cuda::persistent_steps(persistent_call(call, stream), {plan[0], plan[1]},
                                      whole(table, "persistent_steps"), steps, end),
               "persistent_steps");
}

}  // namespace

void bind_cuda_decoder(pybind11::module_& module) {
  // Local: the build of the emulator, with the same class, is loaded in the same process by the tests.
  pybind11::class_<cuda::DecoderCall>(module, "DecoderCall", pybind11::module_local())
      .def(pybind11::init(&decoder_call))
      .def("begin",
           [](const cuda::DecoderCall& call, Address stream) {
             cuda::DecoderCall now = call;
             now.stream = reinterpret_cast<void*>(stream);
             check_launch(cuda::decoder_begin(now), "decoder_begin");
           })
      .def("persistent_plan", &persistent_plan)
      .def("persistent_upload", &persistent_upload)
      .def("persistent_steps", &persistent_steps)
      .def("step", [](const cuda::DecoderCall& call, Address stream) {
        cuda::DecoderCall now = call;
        now.stream = reinterpret_cast<void*>(stream);
        check_launch(cuda::decoder_step(now), "decoder_step");
      });
}

}  // namespace fastgpt
