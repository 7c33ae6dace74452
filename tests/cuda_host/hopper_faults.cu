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

enum ExchangeFault { kExchanges, kReadBefore, kWrittenBefore, kOrderedBackwards };

// Threads of a warpgroup hand words to each other through shared memory, twice, between named barriers; then the last
// warp hands words to the first through a barrier in shared memory. out: (128,).
__global__ void exchange_kernel(uint32_t* out, int fault) {
  uint32_t* const words = reinterpret_cast<uint32_t*>(dynamic_shared());
  const SharedAddress said = shared_address(words) + kWarpgroup * 4;
  if (threadIdx.x == 0) barrier_init(said, kWarp);
  __syncthreads();
  const uint32_t t = threadIdx.x, warp = t / kWarp;
  uint32_t sum = 0;
  for (uint32_t round = 0; round < 2; ++round) {
    if (round == 1 && fault != kWrittenBefore) named_wait(1, kWarpgroup);
    store_shared(words + t, t + round);
    if (fault != kReadBefore) named_wait(1, kWarpgroup);
    sum += load_shared(words + (t + 40) % kWarpgroup);
  }
  named_wait(1, kWarpgroup);
  if (warp == 3) {
    if (fault == kOrderedBackwards) barrier_arrive(said);
    store_shared(words + t, 1000u);
    if (fault != kOrderedBackwards) barrier_arrive(said);
  }
  if (warp == 0) {
    barrier_wait(said, 0);
    sum += load_shared(words + t + 3 * kWarp);
  }
  out[t] = sum;
}

enum LeftFault { kLefts, kLeftChanged, kBytesNotThere, kBytesMisaligned, kNoBegin, kNoCommit };

// out (64, 64) = a b^T + shift of each column: a (64, 16) in registers, b (64, 16 of 64) and shift copied by TMA.
__global__ void left_kernel(const TensorMap b, const uint32_t* a, const float* shift, float* out, int fault) {
  const SharedAddress b_tile = (shared_address(dynamic_shared()) + kSwizzleBytes - 1) / kSwizzleBytes * kSwizzleBytes;
  const SharedAddress shifts = b_tile + 64 * 128, full = shifts + 64 * 4, late = full + 8;
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barrier_init(late, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    barrier_arrive_and_expect(full, 64 * 128);
    copy_box(b_tile, &b, full, 0, 0, 0, 0);
    barrier_arrive_and_expect(late, 64 * 4);
    copy_bytes(shifts, shift + (fault == kBytesMisaligned), 64 * 4, late);
  }
  const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  uint32_t left[4];
  for (int i = 0; i < 4; ++i) left[i] = a[(row + i % 2 * 8) * 8 + t % 4 + i / 2 * 4];
  barrier_wait(full, 0);
  float c[8][4];
  if (fault != kNoBegin) products_begin();
  multiply_rows<__half, false>(c, left, rows_descriptor(b_tile, 64, 0));
  if (fault != kNoCommit) products_commit();
  if (fault == kLeftChanged) left[0] = 0x3c003c00u;
  if (fault != kBytesNotThere) barrier_wait(late, 0);
  products_wait<0>();
  const float* const shared_shift = static_cast<const float*>(shared_pointer(shifts));
  for (int n = 0; n < 8; ++n)
    for (int i = 0; i < 4; ++i) {
      const int at = n * 8 + column + i % 2;
      out[(row + i / 2 * 8) * 64 + at] = c[n][i] + load_shared(shared_shift + at);
    }
  barrier_wait(late, 0);
}

const char* text(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

extern "C" {

const char* run_exchange(uint32_t* out, int fault) {
  return text(launch(exchange_kernel, 1, kWarpgroup, kWarpgroup * 4 + 16, nullptr, out, fault));
}

// a: (64, 16), b: (64, 64), float16; shift: (68,).
const char* run_left(float* out, const uint32_t* a, void* b, const float* shift, int fault) {
  AttentionCall call = {};
  call.batch = call.n_heads = 1;
  call.head_dim = 64;
  call.dtype = DType::kFloat16;
  TensorMap map;
  if (heads_map(map, {b, 0, 0, 64}, call, 64, 64)) return "no map";
  const size_t shared = kSwizzleBytes + 64 * 128 + 64 * 4 + 16;
  return text(launch(left_kernel, 1, kWarpgroup, shared, nullptr, map, a, shift, out, fault));
}

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
  return text(launch(product_kernel, 1, kWarpgroup, shared, nullptr, maps[0], maps[1], out, fault));
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

void run_query_blocks(int* out, int first, int keys, int queries, int q_len, int k_len) {
  const BlockRange blocks = query_blocks(first, keys, queries, q_len, k_len);
  out[0] = blocks.begin;
  out[1] = blocks.split;
  out[2] = blocks.end;
}

// Writers and readers of a ring of three stages and their phases after `uses` uses: stage, phase.
void run_pipeline(int* out, int uses) {
  PipelineState<3> state;
  for (int i = 0; i < uses; ++i) state.advance();
  out[0] = state.stage;
  out[1] = static_cast<int>(state.phase);
}
}
