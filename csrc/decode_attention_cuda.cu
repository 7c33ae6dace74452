// Launches of kernels/cuda/decode_attention.cuh by dtype.
#include "../kernels/cuda/decode_attention.cuh"
#include "cuda_launch.h"

namespace fastgpt {
namespace cuda {
namespace {

template <class T>
CacheView<T> to_cache(const HeadsRef& x) {
  return {static_cast<const T*>(x.data), x.batch_stride, x.head_stride, x.row_stride};
}

template <class T>
int decode(void* out, float* partial, const HeadsRef& q, const HeadsRef& k, const HeadsRef& v, const int64_t* lengths,
           const DecodeCall& call) {
  const DecodeSizes sizes = {call.batch, call.n_heads,      call.max_len, static_cast<int>(call.head_dim), call.splits,
                             0,          call.softmax_scale};
  return decode_attention<T>(static_cast<T*>(out), partial, static_cast<const T*>(q.data), q.batch_stride,
                             q.head_stride, to_cache<T>(k), to_cache<T>(v), lengths, sizes,
                             static_cast<cudaStream_t>(call.stream));
}

}  // namespace

int decode_attention(void* out, float* partial, HeadsRef q, HeadsRef k, HeadsRef v, const int64_t* lengths,
                     const DecodeCall& call) {
  switch (call.dtype) {
    case DType::kFloat32: return decode<float>(out, partial, q, k, v, lengths, call);
    case DType::kBFloat16: return decode<__nv_bfloat16>(out, partial, q, k, v, lengths, call);
    case DType::kFloat16: return decode<__half>(out, partial, q, k, v, lengths, call);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace fastgpt
