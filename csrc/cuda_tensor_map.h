// Tensor maps, by which TMA reads heads. The driver's encoder is asked for by name at run time: libcuda is not linked.
#pragma once

#include "../kernels/cuda/hopper.cuh"
#include "cuda_launch.h"

namespace fastgpt {
namespace cuda {

// Sizes and steps of a map, innermost axis first; steps in bytes, of the axes behind the first.
struct MapShape {
  uint64_t sizes[4];
  uint64_t steps[3];
  uint32_t box[4];
};

#ifdef __CUDACC__

inline cudaError_t encode_map(TensorMap& map, void* data, DType dtype, const MapShape& shape) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  // Asked for once: the entry point stays where it is.
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const uint32_t elements[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type =
      dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(&map, type, 4, data, shape.sizes, shape.steps, shape.box, elements, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The multiprocessors of the current GPU; 0 when it is not one that runs sm_90a.
inline int hopper_processors() {
  int device = 0, major = 0, minor = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return major == 9 && minor == 0 ? processors : 0;
}

#else

inline cudaError_t encode_map(TensorMap& map, void* data, DType, const MapShape& shape) {
  return emulated_map(map, data, shape.sizes, shape.steps, shape.box);
}

// Few, so that a block takes several tiles.
inline int hopper_processors() { return 3; }

#endif

// Boxes of `rows` rows of one head, 64 columns each; zeros beyond the length and head_dim.
inline cudaError_t heads_map(TensorMap& map, const HeadsRef& x, const AttentionCall& call, int64_t length, int rows) {
  const int64_t sizes[4] = {call.head_dim, length, call.n_heads, call.batch};
  const int64_t strides[3] = {x.row_stride, x.head_stride, x.batch_stride};
  MapShape shape = {};
  for (int i = 0; i < 4; ++i) shape.sizes[i] = static_cast<uint64_t>(sizes[i]);
  // An axis of one element is never stepped along, and its stride may be 0, which a map cannot say.
  for (int i = 0; i < 3; ++i)
    shape.steps[i] = sizes[i + 1] == 1 && strides[i] == 0 ? 16 : static_cast<uint64_t>(strides[i]) * 2;
  shape.box[0] = kPanel;
  shape.box[1] = static_cast<uint32_t>(rows);
  shape.box[2] = shape.box[3] = 1;
  return encode_map(map, x.data, call.dtype, shape);
}

}  // namespace cuda
}  // namespace fastgpt
