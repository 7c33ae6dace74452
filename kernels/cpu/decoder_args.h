// The arguments of the decoder's kernels: a GPT of the book as matrices, norms and tables, and one step of it.
#pragma once

#include <cstdint>

namespace fastgpt {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1 };

// How a weight matrix lies in memory: as PyTorch has it, or packed in tiles (decoder_tiles.h).
enum class WeightFormat : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kInt4 = 3 };

// How the keys and values of one token and head lie in the cache: head_dim numbers, of int8 followed by the float32
// that they are multiplied by, unaligned.
enum class CacheFormat : int { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };
constexpr int64_t kCacheScaleBytes = 4;

// Output rows of one tile, and the inputs that share a scale.
constexpr int64_t kTileRows = 16;
constexpr int64_t kScaleGroup = 32;

// y = W x + bias
struct DecoderMatrix {
  const void* data;        // (n_out, n_in) row-major, or tiles
  const uint16_t* scales;  // of int8 and int4: upper halves of float32, (tiles, groups, kTileRows)
  const float* bias;       // (n_out), or null
  int64_t n_out, n_in;
  WeightFormat format;
};

struct DecoderNorm {
  const float *weight, *bias;  // (emb_dim)
  float eps;
};

struct DecoderLayer {
  DecoderNorm norm1, norm2;
  DecoderMatrix query, key, value, project, widen, narrow;
};

struct DecoderModel {
  const float *tok_emb, *pos_emb;  // (vocab_size, emb_dim), (context_length, emb_dim)
  const DecoderLayer* layers;
  DecoderNorm final_norm;
  DecoderMatrix head;
  int64_t n_layers, emb_dim, n_heads, head_dim, hidden_dim;
};

// A copy of the head that tells which logits can be among the largest (fast_head.h).
constexpr int64_t kScreenStats = 3;  // of a row: scale, norm of what the copy lost, norm of the row and the copy
constexpr int64_t kScreenUnit = 64;  // rows of the copy are filled up with 0 to a multiple of this
constexpr int64_t kMostTop = 128;
constexpr int64_t kMostScreened = 8;  // outputs of one step; for more the products cost more than the bytes

struct HeadScreen {
  const int8_t* rows;  // (n_logits, n_in rounded up)
  const float* stats;  // (n_logits, kScreenStats)
  int64_t top_k;       // so many of the largest logits are wanted, and what ties with the last; 1 to kMostTop
  bool fill;           // give logits: -inf for those that are not among the largest for sure
  float* workspace;    // as many as screen_floats says
  int64_t* outcome;    // (2): how many rows were left to multiply, and whether the copy is not that of the weights
};

// How tokens are drawn (draw.h).
struct DrawOptions {
  float inverse_temperature;
  int64_t top_k;  // 0 for no limit
  double top_p;   // 1 for no limit
  uint64_t seed;
  int64_t drawn;  // tokens that each row has drawn before
};

struct DrawArgs {
  int64_t* tokens;      // (count)
  const float* logits;  // (count, n)
  const int64_t* rows;  // (count): the numbers of the rows, with which their noise is drawn
  int64_t count, n;     // n below 2^32
  DrawOptions options;
  void* workspace;  // as many bytes as draw_bytes says, aligned to 8
  int num_threads;
};

struct ScreenRowsArgs {
  int8_t* rows;
  float* stats;
  const float* weight;  // (n_out, n_in)
  int64_t n_out, n_in;
  int num_threads;
};

// One step: `count` entries, each a token at a position of a row of the cache. Entries of one row may follow each
// other.
struct DecoderStepArgs {
  const DecoderModel* model;
  void* cache;  // (n_layers, 2, batch, n_heads, capacity, head_dim or head_dim + 4 bytes): keys, values
  CacheFormat cache_format;
  int64_t batch, capacity;
  const int64_t *tokens, *rows, *positions;  // (count)
  int64_t count;
  const int64_t* wanted;  // (n_wanted), increasing: the entries behind which logits are wanted
  int64_t n_wanted;
  int64_t prompt_keys;  // 0; or the entries are pieces of prompts, and no position is beyond this number
  float* logits;        // (n_wanted, n_logits)
  int64_t* best;        // (n_wanted): the first largest logit, NaN counting as the largest; or null
  float* workspace;     // as many as decoder_floats says
  int num_threads;
  const HeadScreen* screen;  // or null: multiply the whole head
  const DrawArgs* draw;      // or null: draw a token for each wanted entry, from its logits
};

// A float32 matrix into the tiles of a format.
struct DecoderPackArgs {
  uint8_t* data;        // as many bytes as decoder_pack_bytes says
  uint16_t* scales;     // (tiles, groups, kTileRows); null for bfloat16
  const float* weight;  // (n_out, n_in)
  int64_t n_out, n_in;
  WeightFormat format;
  int num_threads;
};

}  // namespace fastgpt
