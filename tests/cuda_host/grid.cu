// The plan of the persistent decoder's weights and the barrier of a grid, for the tests: right, and with one fault
// each.
#include "../../kernels/cuda/decode_stream.cuh"
#include "../../kernels/cuda/grid_barrier.cuh"

namespace {

using namespace fastgpt::cuda;

enum Fault { kNone, kNoBarrier, kMissingBlock };

// Each block writes one number a round and reads that of the block behind it.
__global__ void ring_kernel(float* numbers, uint32_t* counter, uint32_t begin, int rounds, int fault) {
  GridBarrier barrier{counter, {gridDim.x, begin}};
  const unsigned next = (blockIdx.x + 1) % gridDim.x;
  if (fault == kMissingBlock && blockIdx.x == 1) return;
  for (int round = 0; round < rounds; ++round) {
    float* now = numbers + round % 2 * gridDim.x;
    if (threadIdx.x == 0) write_l2(now + blockIdx.x, static_cast<float>(round * 100 + blockIdx.x));
    if (fault != kNoBarrier) barrier.wait();
    if (threadIdx.x != 32) continue;
    const bool there = read_l2(now + next) == static_cast<float>(round * 100 + next);
    if (!there && fault == kNone) emulator::fail("a number of another block is not there");
  }
}

}  // namespace

// numbers: 2 a block; counter: where the barrier begins to count.
extern "C" const char* run_ring(float* numbers, uint32_t* counter, int blocks, int multiprocessors, int rounds,
                                int fault) {
  // Shared with the other emulated modules of the process.
  const int others = emulator::multiprocessors;
  emulator::multiprocessors = multiprocessors;
  const cudaError_t error = launch_cooperative(ring_kernel, static_cast<unsigned>(blocks), 64, 0, nullptr, numbers,
                                               counter, *counter, rounds, fault);
  emulator::multiprocessors = others;
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

extern "C" bool reached(uint32_t count, uint32_t target) { return BarrierCount::reached(count, target); }

// The items of one warp in the order of its copies: (token, layer, matrix, row, part) each. rows, columns: of the
// matrices of a layer, then of the head.
extern "C" int walk(int* out, int warp, int layers, int tokens, const int* rows, const int* columns, int size,
                    int block, int blocks) {
  StreamShare shares[kStreamMatrices];
  for (int i = 0; i < kStreamMatrices; ++i) shares[i] = StreamShare::of(rows[i], columns[i], size, block, blocks);
  StreamCursor cursor = StreamCursor::begin(warp, layers, tokens);
  int count = 0;
  for (; cursor.settle(shares); cursor.item += kStreamWarps, ++count) {
    const StreamShare& share = shares[cursor.matrix];
    const int row = share.row_of(cursor.item);
    const int item[5] = {tokens - cursor.tokens, cursor.layer, cursor.matrix, share.begin + row,
                         cursor.item - row * share.parts};
    for (int i = 0; i < 5; ++i) out[count * 5 + i] = item[i];
  }
  return count;
}

extern "C" int parts_of(int columns, int size) { return StreamShare::of(1, columns, size, 0, 1).parts; }
extern "C" int place(int column, int size) { return stream_place(column, size); }
