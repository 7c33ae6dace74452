// Launches of kernels/cuda/decode_step.cuh by dtype.
#include "../kernels/cuda/decode_step.cuh"
#include "cuda_decoder.h"

namespace fastgpt {
namespace cuda {
namespace {

// One matrix, or three below each other.
template <class T>
Matrix<T> to_matrix(const void* const* weights, const void* const* biases, int parts, int64_t part_rows, int64_t n) {
  Matrix<T> out = {};
  for (int i = 0; i < parts; ++i) {
    out.weight[i] = static_cast<const T*>(weights[i]);
    out.bias[i] = static_cast<const T*>(biases[i]);
  }
  out.part_rows = static_cast<int>(part_rows);
  out.rows = static_cast<int>(part_rows * parts);
  out.columns = static_cast<int>(n);
  return out;
}

template <class T>
RowNorm<T> to_norm(const void* weight, const void* bias, float eps) {
  return {static_cast<const T*>(weight), static_cast<const T*>(bias), eps};
}

template <class T>
StepLayer<T> to_layer(const DecoderLayer& layer, const DecoderSizes& s) {
  const int64_t heads = s.n_heads * s.head_dim;
  const auto one = [](const void* const& weight, const void* const& bias, int64_t rows, int64_t columns) {
    return to_matrix<T>(&weight, &bias, 1, rows, columns);
  };
  const auto cache = [&](const void* data) -> CacheView<T> {
    return {static_cast<const T*>(data), s.batch_stride, s.head_stride, s.row_stride};
  };
  return {to_norm<T>(layer.norm1_weight, layer.norm1_bias, layer.eps1),
          to_norm<T>(layer.norm2_weight, layer.norm2_bias, layer.eps2),
          to_matrix<T>(layer.heads, layer.heads_bias, 3, heads, s.emb_dim),
          one(layer.project, layer.project_bias, s.emb_dim, heads),
          one(layer.widen, layer.widen_bias, s.hidden_dim, s.emb_dim),
          one(layer.narrow, layer.narrow_bias, s.emb_dim, s.hidden_dim),
          cache(layer.keys),
          cache(layer.values)};
}

template <class T>
Embeddings<T> to_embeddings(const DecoderCall& call) {
  return {static_cast<const T*>(call.tok_emb), static_cast<const T*>(call.pos_emb),
          static_cast<int>(call.sizes.emb_dim)};
}

template <class T>
int begin(const DecoderCall& call) {
  return launch(decode_embed_kernel<T>, static_cast<unsigned>(call.sizes.batch), kChooseThreads, 0,
                static_cast<cudaStream_t>(call.stream), call.x, static_cast<const int64_t*>(call.state),
                to_embeddings<T>(call));
}

template <class T>
int step(const DecoderCall& call) {
  const DecoderSizes& s = call.sizes;
  const LinearLaunch how = {s.batch, static_cast<int>(s.most_blocks), static_cast<int>(s.most_shared), call.overlap,
                            static_cast<cudaStream_t>(call.stream)};
  const StepBuffers<T> to = {static_cast<T*>(call.queries),
                             static_cast<T*>(call.attended),
                             static_cast<T*>(call.hidden),
                             call.partial,
                             call.arrived,
                             call.best};
  const int head_dim = static_cast<int>(s.head_dim);
  const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
  const DecodeSizes attention = {s.batch, s.n_heads, s.max_len, head_dim, static_cast<int>(s.splits), 0, scale};
  for (const DecoderLayer& layer : call.layers) {
    const cudaError_t error = decode_layer(to_layer<T>(layer, s), call.x, call.state, to, attention, how);
    if (error != cudaSuccess) return error;
  }
  const Matrix<T> head = to_matrix<T>(&call.head, &call.head_bias, 1, s.n_logits, s.emb_dim);
  const DrawOptions* draw = static_cast<const DrawOptions*>(call.draw);
  Choose choose = {call.state, call.found, call.x, call.best, call.top_k ? call.logits : nullptr, draw, 0, 0, 0, 0};
  choose.n_logits = static_cast<int>(s.n_logits);
  choose.max_len = static_cast<int>(s.max_len);
  choose.group = static_cast<int>(s.group);
  return decode_end(head, to_norm<T>(call.norm_weight, call.norm_bias, call.eps), to, call.logits,
                    call.drawn && !call.top_k, choose, to_embeddings<T>(call), how);
}

}  // namespace

int decoder_begin(const DecoderCall& call) {
  return call.dtype == DType::kFloat32 ? begin<float>(call) : begin<__nv_bfloat16>(call);
}

int decoder_step(const DecoderCall& call) {
  if (call.overlap) {
#ifdef __CUDACC__
    // Elsewhere the kernels are compiled from PTX without the waiting.
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    if (major != 9) return cudaErrorNotSupported;
#endif
  }
  return call.dtype == DType::kFloat32 ? step<float>(call) : step<__nv_bfloat16>(call);
}

}  // namespace cuda
}  // namespace fastgpt
