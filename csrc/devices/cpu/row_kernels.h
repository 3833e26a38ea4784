// Row kernels: norm, rope, gates, softmax, float products on raw rows; one build per instruction
// set, chosen once. Called by the operators in this folder. Every kernel is single-threaded and
// touches only the rows it is given.
#pragma once

#include <cstdint>

#include "devices/cpu/block_formats.h"
#include "graph/prompt_score.h"
#include "graph/sampling_params.h"

namespace flowprefill {

// bfloat16 as bits: the upper half of an IEEE float.
using Bf16 = uint16_t;

// How one attention head vector is brought into place. Pointers may be null where a model has no
// such thing.
struct RopeHead {
  const float* bias;         // [dim] added first
  const float* norm_weight;  // [dim] RMS norm over the head (Qwen3)
  float norm_eps;
  float inverse_rms;  // of the row that the head is part of (OLMo 2); 0: the head's own
  float scale;        // multiplied in at the end (softmax scale folded into q)
  int dim;
  int turning;  // the first so many dimensions turn, the others stay
};

// Where one tile of the running softmax lives. S, P are [rows, ld]; O is [rows, dim].
struct SoftmaxTile {
  float* scores;  // in: raw scores; used as scratch
  int64_t ld;     // of scores and of probabilities
  int rows;
  int cols;             // columns of this tile
  const int* valid_lo;  // [rows] first valid column of each row (may exceed cols)
  const int* valid_hi;  // [rows] one past the last valid column (may be <= valid_lo)
  float* row_max;       // [rows] running maximum
  float* row_sum;       // [rows] running sum
  float* output;        // [rows, dim] rescaled when the maximum moves
  int dim;
  float softcap;  // of the scores as they come in, see soft_cap; 0: none
};

inline constexpr float kNoMaximum = -1e30f;  // row_max of an AttentionTile's row without a key yet
inline constexpr int kSumLanes = 16;         // running sums of a row, to be added up at the end

// The softmax of some rows over some of their keys.
struct PartialSoftmax {
  float* row_max;  // [rows] in base 2: what sums and outputs are divided by the power of; at most
                   // kNoMaximum: of a row that saw none of the keys
  float* row_sum;  // [rows, sums]
  float* output;   // [rows, dim] not yet divided by the sum
  int sums;        // of a row, to be added up at the end: kSumLanes or 1
  int dim;
};

// Query rows of one kv head against one block of its keys and values, in bf16 (kv_cache.h has the
// layouts). What is running is carried from block to block.
struct AttentionTile {
  const Bf16* q;  // [rows, dim]
  const Bf16* keys;
  const Bf16* values;
  int rows;
  int dim;                      // a multiple of 16
  int tokens;                   // of the block; a multiple of 16
  bool sees_all;                // whether every row sees the whole block; else:
  const int* valid_lo;          // [rows] first token each row sees (may be < 0)
  const int* valid_hi;          // [rows] one past the last (may be <= valid_lo, or > tokens)
  float* row_max;               // [rows] running maximum, or somewhat less; kNoMaximum at first
  float* row_sum;               // [rows, kSumLanes]
  float* output;                // [rows, dim] running, not yet divided by the sum
  float softcap;                // of the scores, see soft_cap; 0: none
  const Bf16* ahead = nullptr;  // the block that comes next, keys and values; null: not known
};

// c[rows, n] (+)= a[rows, k] * b[k, n], row-major with these strides.
template <typename T>
struct Product {
  int64_t rows, n, k, lda, ldb, ldc;
  bool add;
  const T* a;
  const T* b;
  float* c;
  const T* ahead = nullptr;  // k * n weights that the caller multiplies next, if it knows them
};

inline constexpr int kTileColumns = 16;  // of sums on one AMX tile

// c[rows, columns] (+)= a * b on AMX tiles, of bf16 into floats or of bytes (a without sign, b
// with) into int32. b is packed by strips of 16 columns, [columns / 16][depth_bytes / 4][16][4
// bytes].
struct TileProduct {
  int64_t rows;         // at least 1
  int64_t columns;      // a multiple of kTileColumns
  int64_t depth_bytes;  // of a row of a, and of a column of b: a multiple of 64
  int64_t strip_bytes;  // from one strip to the next
  int64_t lda;          // bytes
  int64_t ldc;          // elements
  bool add;
  const void* a;
  const void* b;
  void* c;
  const void* ahead = nullptr;  // the block that is multiplied next, as large as b; null: not known
};

// Values that rotate() mixes with one another.
inline constexpr int kRotatedRun = 64;
// The byte that stands for zero in a row of bytes.
inline constexpr int kByteZero = 128;

// Sums of products of bytes, and what makes them numbers again.
struct ByteProduct {
  const int32_t* product;  // [rows, columns]
  int columns;
  const float* column_scales;
  const int32_t* column_shifts;  // taken off every sum
  const uint8_t* row_scales;     // one float for each row, this many bytes apart
  int64_t row_stride;
};

// Rows that are multiplied by quantised blocks as they are.
struct FewRows {
  const void* rows;  // of few_row_bytes() each, as prepare_few() fills them
  int64_t stride;    // bytes
  int count;
};

// Its values take the room of floats; then come the sums of each 32 values in floats, and those of
// each 16.
constexpr int64_t few_row_bytes(int64_t depth) {
  return (depth + depth / 32 + depth / 16) * static_cast<int64_t>(sizeof(float));
}

template <typename T>  // T: float or Bf16, the element type of activations and KV cache
struct RowKernels {
  // out[i] = x[i] / rms(x) * weight[i]; n elements.
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, T* out);
  // 1 / rms(x + bias); no bias: null.
  float (*inverse_rms)(const float* x, const float* bias, int n, float eps);
  // out[i] += scale * x[i], or scale * x[i] / rms(x) * weight[i] if there is a weight.
  void (*add_scaled)(const float* x, const float* weight, int n, float eps, float scale,
                     float* out);
  // tile is [rows, 2 * cols] = gate | up (+ bias): out = silu(gate) * up.
  void (*swiglu)(const float* tile, int64_t ld, int rows, int cols, T* out, int64_t ld_out);
  // The same with gelu(gate), by the formula with tanh.
  void (*geglu)(const float* tile, int64_t ld, int rows, int cols, T* out, int64_t ld_out);
  // x[i] = cap * tanh(x[i] / cap).
  void (*soft_cap)(float* x, int n, float cap);
  // Rotates one head (halves convention) by cos/sin [turning / 2]; out is [dim].
  void (*rope)(const float* in, const RopeHead& head, const float* cos, const float* sin, T* out);
  // Stores `rows` rotated keys [rows, dim] as columns slot, slot + 1, ... of a key block
  // (kv_cache.h).
  void (*store_keys)(const T* keys, int rows, int dim, T* block, int slot, int block_tokens);
  // Stores `rows` values (stride ld, plus bias if there is one) as rows slot, ... of a value block.
  void (*store_values)(const float* in, int64_t ld, const float* bias, int rows, int dim, T* block,
                       int slot);
  // One tile of the online softmax in base 2: updates max, sum, output; writes probabilities.
  void (*softmax)(const SoftmaxTile& tile, T* probabilities);
  // Adds the softmax over further keys to that over those before them.
  void (*merge)(const PartialSoftmax& further, int rows, const PartialSoftmax& all);
  // out[r, i] = output[r, i] / sum[r].
  void (*normalise)(const float* output, const float* row_sum, int rows, int dim, T* out,
                    int64_t ld_out);
  // One block of attention, scores kept in registers; null where the processor has no instruction
  // for it.
  void (*attend)(const AttentionTile& tile);
  // The same on AMX tiles, for has_amx() only; dim and tokens are multiples of 32. What lies by
  // rows has room for whole sixteens of them; ahead is not looked at. No other code may have this
  // thread's tiles in use.
  void (*attend_by_tiles)(const AttentionTile& tile);
  // Each sum runs over k in order, so a row's bits do not depend on its neighbours. Of floats any
  // sizes; of Bf16 packed as [k / 2][n][2] with k even and n a multiple of 16, with the bits of
  // ATen's micro-kernel, null where the processor has no instruction for it.
  void (*multiply)(const Product<T>& product);
  // The same on AMX tiles, for has_amx() only: of bf16, and of bytes. No other code may have this
  // thread's tiles in use.
  void (*multiply_by_tiles)(const TileProduct& product);
  void (*multiply_bytes_by_tiles)(const TileProduct& product);
  // out[i] = table[i] as float.
  void (*widen)(const T* row, int n, float* out);
  // out[i] = row[i] rounded to T.
  void (*narrow)(const float* row, int n, T* out);
  // Depths [begin, end) of a strip of 16 columns (block_formats.h), multiples of 32, rounded to T:
  // float as [depth][ld], Bf16 as [depth / 2][ld][2].
  void (*unpack)(BlockFormat format, const uint8_t* strip, int64_t begin, int64_t end, T* out,
                 int64_t ld);
  // Brings one row of `depth` values into the form of FewRows.
  void (*prepare_few)(const T* a, int64_t depth, void* row);
  // out[count, 16] = rows * strip. A row's result does not depend on the others.
  void (*multiply_few)(BlockFormat format, const uint8_t* strip, int64_t depth, const FewRows& rows,
                       float* out);
  // What is kept of a row of n logits; target: the token that follows, -1: none.
  void (*score)(const float* logits, int n, int target, PromptScore& out);
  // The first of the largest of n logits; -1: NaN or +inf among them, or all of them -inf.
  int32_t (*most_likely)(const float* logits, int n);
  // weights[i] = e^((logits[i] - top) / temperature), or 0 where that is below min_p; top: the
  // largest logit.
  void (*weigh)(const float* logits, int n, float top, const SamplingParams& params,
                float* weights);
  // In double.
  double (*sum)(const float* x, int n);
  // Where x[i] >= least > 0, ascending, into found [n]; returns how many.
  int32_t (*find_at_least)(const float* x, int n, float least, int32_t* found);
  // Rotates a row in runs of kRotatedRun (isa_int8.h); out is as long as whole runs, the last one
  // filled up with zeros first. Returns the largest size in it, or NaN if there is one.
  float (*rotate)(const T* row, int n, float* out);
  // out[i] = row[i] * scale, rounded, + kByteZero; the product is within -127 and 127.
  void (*round_to_bytes)(const float* row, int n, float scale, uint8_t* out);
  // c[r, i] (+)= (product[r, i] - column_shifts[i]) * row scale * column_scales[i].
  void (*scale_product)(const ByteProduct& product, int rows, float* c, int64_t ldc, bool add);
};

// The kernels for isa(). Throws what that throws. Thread-safe; cost: one load.
template <typename T>
const RowKernels<T>& row_kernels();

}  // namespace flowprefill
