// Launches of kernels/cuda/decode_persistent.cuh by dtype.
#include <vector>

#include "../kernels/cuda/decode_persistent_launch.cuh"
#include "cuda_decoder.h"

namespace fastgpt {
namespace cuda {
namespace {

static_assert(sizeof(StreamLayer<float>) == kLayerBytes, "the table of layers has another size than Python gives it");
static_assert(kMostStreamWidth == kMostPersistentWidth, "the bindings check another width");

template <class T>
StreamLayer<T> to_stream_layer(const DecoderLayer& layer) {
  StreamLayer<T> out = {};
  const auto as = [](const void* pointer) { return static_cast<const T*>(pointer); };
  const void* weights[6] = {layer.heads[0], layer.heads[1], layer.heads[2], layer.project, layer.widen, layer.narrow};
  const void* biases[6] = {layer.heads_bias[0], layer.heads_bias[1], layer.heads_bias[2],
                           layer.project_bias,  layer.widen_bias,    layer.narrow_bias};
  for (int i = 0; i < 6; ++i) {
    out.weight[i] = as(weights[i]);
    out.bias[i] = as(biases[i]);
  }
  out.norm_weight[0] = as(layer.norm1_weight);
  out.norm_bias[0] = as(layer.norm1_bias);
  out.norm_weight[1] = as(layer.norm2_weight);
  out.norm_bias[1] = as(layer.norm2_bias);
  out.keys = static_cast<T*>(layer.keys);
  out.values = static_cast<T*>(layer.values);
  out.eps[0] = layer.eps1;
  out.eps[1] = layer.eps2;
  return out;
}

template <class T>
StreamCall<T> to_stream_call(const DecoderCall& call, const void* table, int steps, int64_t end) {
  const DecoderSizes& s = call.sizes;
  const auto as = [](const void* pointer) { return static_cast<const T*>(pointer); };
  StreamCall<T> out = {};
  out.layers = static_cast<const StreamLayer<T>*>(table);
  out.norm = {as(call.norm_weight), as(call.norm_bias), call.eps};
  out.head = as(call.head);
  out.head_bias = as(call.head_bias);
  out.table = {as(call.tok_emb), as(call.pos_emb), static_cast<int>(s.emb_dim)};
  out.x = call.x;
  out.queries = static_cast<T*>(call.queries);
  out.hidden = static_cast<T*>(call.hidden);
  out.partial = call.partial;
  out.arrived = call.arrived;
  out.best = call.best;
  out.logits = call.logits;
  out.state = call.state;
  out.found = call.found;
  out.draw = call.drawn ? static_cast<const DrawOptions*>(call.draw) : nullptr;
  out.top_k = call.top_k;
  out.n_layers = static_cast<int>(call.layers.size());
  out.hidden_dim = static_cast<int>(s.hidden_dim);
  out.n_logits = static_cast<int>(s.n_logits);
  out.max_len = static_cast<int>(s.max_len);
  out.group = static_cast<int>(s.group);
  out.steps = steps;
  out.end = end;
  out.head_stride = s.head_stride;
  out.row_stride = s.row_stride;
  const int head_dim = static_cast<int>(s.head_dim);
  out.sizes = {1, s.n_heads, s.max_len, head_dim, static_cast<int>(s.splits), 0, 0.0f};
  out.sizes.lanes = lanes_for((head_dim + Pack<T>::kSize - 1) / Pack<T>::kSize);
  out.sizes.scale = 1.0f / sqrtf(static_cast<float>(head_dim));
  return out;
}

template <class T>
int plan_for(const DecoderCall& call, PersistentPlan* plan) {
  StreamPlan found = {};
  const cudaError_t error = plan_persistent(to_stream_call<T>(call, nullptr, 0, -1), call.sizes.most_shared, &found);
  *plan = {found.blocks, found.stages};
  return error;
}

template <class T>
int upload(const DecoderCall& call, void* table) {
  std::vector<StreamLayer<T>> layers;
  for (const DecoderLayer& layer : call.layers) layers.push_back(to_stream_layer<T>(layer));
#ifdef __CUDACC__
  const cudaStream_t stream = static_cast<cudaStream_t>(call.stream);
  const cudaError_t error =
      cudaMemcpyAsync(table, layers.data(), layers.size() * sizeof(layers[0]), cudaMemcpyHostToDevice, stream);
  return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
#else
  memcpy(table, layers.data(), layers.size() * sizeof(layers[0]));
  return cudaSuccess;
#endif
}

template <class T>
int steps_of(const DecoderCall& call, PersistentPlan plan, const void* table, int steps, int64_t end) {
  return decode_persistent(to_stream_call<T>(call, table, steps, end), {plan.blocks, plan.stages},
                           static_cast<cudaStream_t>(call.stream));
}

}  // namespace

int persistent_plan(const DecoderCall& call, PersistentPlan* plan) {
  return call.dtype == DType::kFloat32 ? plan_for<float>(call, plan) : plan_for<__nv_bfloat16>(call, plan);
}

int persistent_upload(const DecoderCall& call, void* table) {
  return call.dtype == DType::kFloat32 ? upload<float>(call, table) : upload<__nv_bfloat16>(call, table);
}

int persistent_steps(const DecoderCall& call, PersistentPlan plan, const void* table, int steps, int64_t end) {
  return call.dtype == DType::kFloat32 ? steps_of<float>(call, plan, table, steps, end)
                                       : steps_of<__nv_bfloat16>(call, plan, table, steps, end);
}

}  // namespace cuda
}  // namespace fastgpt
