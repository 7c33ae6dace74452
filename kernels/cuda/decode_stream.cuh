// Which weights of a network each warp of a persistent decoder reads, and in which order: the plan that the copies,
// which run ahead, and the products, which follow, walk alike. Plain arithmetic, tested on the CPU.
//
// A token is a walk over the matrices of all layers, then the head, then the next token. Block b of n has the rows
// rows * b / n .. rows * (b + 1) / n - 1 of each matrix. A row is cut into parts of at most 4 pieces of 16 bytes a
// lane; row and part make an item, 2 KiB of weights at most. The items of a block go to its warps in turn, on from
// where the matrix before left off, so that all warps read the same number of bytes, within one item.
#pragma once

#include "common.cuh"

namespace fastgpt {
namespace cuda {

constexpr int kStreamWarps = 16;
constexpr int kItemPieces = 4;

enum StreamMatrix { kHeadsMatrix, kProjectMatrix, kWidenMatrix, kNarrowMatrix, kHeadMatrix, kStreamMatrices };

// What one block has of a matrix.
struct StreamShare {
  int begin, rows, columns;
  int parts, pieces;  // of a row, and of a part
  int items;

  // `size`: elements of a piece of 16 bytes.
  __host__ __device__ static StreamShare of(int all_rows, int columns, int size, int block, int blocks) {
    StreamShare s = {};
    s.begin = static_cast<int>(static_cast<int64_t>(all_rows) * block / blocks);
    s.rows = static_cast<int>(static_cast<int64_t>(all_rows) * (block + 1) / blocks) - s.begin;
    s.columns = columns;
    const int pieces = (columns + kWarp * size - 1) / (kWarp * size);
    s.parts = (pieces + kItemPieces - 1) / kItemPieces;
    s.pieces = (pieces + s.parts - 1) / s.parts;
    s.items = s.rows * s.parts;
    return s;
  }

  __host__ __device__ int row_of(int item) const { return parts == 1 ? item : item / parts; }

  // The first item of a warp, where the matrix's first item goes to warp `base`.
  __host__ __device__ static int first_of(int warp, int base) { return (warp - base) & (kStreamWarps - 1); }
  __host__ __device__ int base_after(int base) const { return (base + items) & (kStreamWarps - 1); }
};

// Where one warp's copies are.
struct StreamCursor {
  int warp, layers, tokens;  // tokens: still to be read
  int layer, matrix, base, item;

  __host__ __device__ static StreamCursor begin(int warp, int layers, int tokens) {
    return {warp, layers, tokens, 0, layers > 0 ? kHeadsMatrix : kHeadMatrix, 0, warp};
  }

  // Moves on to the next item of this warp from here on, this one included; false when there is none.
  __host__ __device__ bool settle(const StreamShare* shares) {
    while (tokens > 0 && item >= shares[matrix].items) {
      base = shares[matrix].base_after(base);
      item = StreamShare::first_of(warp, base);
      if (matrix == kHeadMatrix) {
        --tokens;
        layer = 0;
        matrix = layers > 0 ? kHeadsMatrix : kHeadMatrix;
      } else if (matrix == kNarrowMatrix) {
        ++layer;
        matrix = layer < layers ? kHeadsMatrix : kHeadMatrix;
      } else {
        ++matrix;
      }
    }
    return tokens > 0;
  }
};

// Where column c of the input stands in shared memory: for each 32 pieces of a row, planes of 4 elements of each lane,
// so that the lanes of a warp read 16 bytes that lie side by side.
__host__ __device__ inline int stream_place(int column, int size) {
  const int group = kWarp * size, inside = column % group;
  return column - inside + inside % size / 4 * (kWarp * 4) + inside / size * 4 + inside % 4;
}

}  // namespace cuda
}  // namespace fastgpt
