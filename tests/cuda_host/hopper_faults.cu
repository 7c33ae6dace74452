// A product by TMA, mbarrier and wgmma with one fault each, and one without: what the emulator must tell apart. And the
// arithmetic of hopper_layout.h, for the tests.
#include "../../csrc/cuda_tensor_map.h"

namespace {

using namespace fastgpt::cuda;

enum Fault { kNone, kNotThere, kOverwritten, kReadEarly, kTooManyBytes, kTooManyArrivals, kNoInit, kUnevenTurn };

// out (64, 128) = a b^T; a: (64, 64), b: (128, 64). One warpgroup, whose first thread copies too.
__global__ void product_kernel(const TensorMap a, const TensorMap b, float* out, int fault) {
  const SharedAddress tiles = (shared_address(dynamic_shared()) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  const SharedAddress a_tile = tiles, b_tile = tiles + 64 * 128, full = b_tile + 128 * 128;
  if (threadIdx.x == 0 && fault != kNoInit) barrier_init(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_arrive_and_expect(full, 192 * 128 + (fault == kTooManyBytes ? 16 : 0));
    if (fault == kTooManyArrivals) barrier_arrive(full);
    copy_box(a_tile, &a, full, 0, 0, 0, 0);
    copy_box(b_tile, &b, full, 0, 0, 0, 0);
  }
  if (fault != kNotThere) barrier_wait(full, 0);
  if (fault == kUnevenTurn && threadIdx.x < kWarp) named_arrive(1, 2 * kWarp);
  float c[16][4];
  products_begin();
  multiply_rows<__half, false>(c, rows_descriptor(a_tile, 64, 0), rows_descriptor(b_tile, 128, 0));
  for (int s = 1; s < 4; ++s)
    multiply_rows<__half, true>(c, rows_descriptor(a_tile, 64, s), rows_descriptor(b_tile, 128, s));
  products_commit();
  if (fault == kOverwritten && threadIdx.x == 0) {
    barrier_arrive_and_expect(full, 64 * 128);
    copy_box(a_tile, &a, full, 0, 0, 0, 0);
  }
  __syncthreads();
  const float early = c[0][0];
  products_wait<0>();
  if (fault == kNotThere) barrier_wait(full, 0);
  const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  for (int n = 0; n < 16; ++n)
    for (int i = 0; i < 4; ++i) out[(row + i / 2 * 8) * 128 + n * 8 + column + i % 2] = c[n][i];
  if (fault == kReadEarly) out[row * 128 + column] = early;
}

}  // namespace

extern "C" {

// a, b: float16, contiguous. Returns what went wrong, or nullptr.
const char* run_product(float* out, void* a, void* b, int fault) {
  AttentionCall call = {};
  call.batch = call.n_heads = 1;
  call.head_dim = 64;
  call.dtype = DType::kFloat16;
  TensorMap maps[2];
  if (heads_map(maps[0], {a, 0, 0, 64}, call, 64, 64) || heads_map(maps[1], {b, 0, 0, 64}, call, 128, 128))
    return "no map";
  const size_t shared = kSwizzleBytes + 192 * 128 + 8;
  const cudaError_t error = launch(product_kernel, 1, kWarpgroup, shared, nullptr, maps[0], maps[1], out, fault);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

uint64_t run_rows_descriptor(uint32_t tile, int rows, int step) { return rows_descriptor(tile, rows, step); }
uint64_t run_columns_descriptor(uint32_t tile, int rows, int step) { return columns_descriptor(tile, rows, step); }
uint32_t run_swizzled(uint32_t address) { return swizzled(address); }
uint32_t run_tile_of_round(uint32_t round, uint32_t block, uint32_t blocks) {
  return tile_of_round(round, block, blocks);
}
void run_key_blocks(int* out, int first, int queries, int keys, int q_len, int k_len) {
  const KeyBlocks blocks = key_blocks(first, queries, keys, q_len, k_len);
  out[0] = blocks.full;
  out[1] = blocks.all;
}

// Writers and readers of a ring of three stages and their phases after `uses` uses: stage, phase.
void run_pipeline(int* out, int uses) {
  PipelineState<3> state;
  for (int i = 0; i < uses; ++i) state.advance();
  out[0] = state.stage;
  out[1] = static_cast<int>(state.phase);
}
}
