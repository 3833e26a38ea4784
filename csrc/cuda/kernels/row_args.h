// Arguments of the row kernels: raw pointers and strides, in elements. Filled by whoever launches
// (kernels.h), read by the bodies. Every ld_* is the distance between rows.
#pragma once

#include "cuda/kernels/batch_view.h"

namespace flowprefill {

struct EmbedArgs {
  BatchView batch;    // tokens, sequences
  const Bf16* table;  // [vocab, width]
  int64_t ld_table;   // a multiple of 8
  float* hidden;      // [rows, width] the residual stream
  int64_t ld_hidden;  // a multiple of 4
  int32_t rows;
  int32_t width;  // a multiple of 8
};

struct RotaryArgs {
  BatchView batch;                   // sequences, positions
  const double* turns_per_position;  // [head_dim / 2] inverse frequency / (2 pi)
  float scale;                       // multiplies cos and sin (yarn)
  float* rotary;                     // [rows, head_dim] cos | sin, dense
  int32_t rows;
  int32_t head_dim;  // even
};

struct RmsNormArgs {
  float* hidden;  // read; written only where there is a delta
  int64_t ld_hidden;
  const float* delta;  // [rows, width] added to hidden first, or null
  int64_t ld_delta;
  const float* weight;     // [width]
  const int32_t* rows_in;  // [rows] which row of hidden (-1: padding), or null: row i is i
  Bf16* out;               // [rows, width]
  int64_t ld_out;
  int32_t rows;
  int32_t width;  // a multiple of 4, as the strides
  float eps;
};

template <typename In>  // float or Bf16: what the qkv product was rounded to
struct RopeArgs {
  BatchView batch;  // sequences, positions, block_tables
  const In* qkv;    // [rows, (heads + 2 * kv_heads) * head_dim] queries | keys | values
  int64_t ld_qkv;
  const float* bias;    // [columns of qkv] or null (also null if the product added it)
  const float* q_norm;  // [head_dim] or null
  const float* k_norm;
  const float* rotary;  // [rows, head_dim] of RotaryArgs
  Bf16* q;              // [rows, heads * head_dim]
  int64_t ld_q;
  CacheView cache;
  float q_scale;  // log2(e) / sqrt(head_dim): attention works in base 2
  float eps;
  int32_t rows;
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;  // even, at most 256
};

template <typename In>  // float or Bf16
struct SwigluArgs {
  const In* in;  // [rows, 2 * width] gate | up
  int64_t ld_in;
  Bf16* out;  // [rows, width]
  int64_t ld_out;
  int32_t rows;
  int32_t width;  // a multiple of 8, as the strides
};

struct ArgmaxArgs {
  const float* values;  // [rows, width]
  int64_t ld_values;
  int32_t* out;  // [rows]
  int32_t rows;
  int32_t width;
};

// Each throws std::invalid_argument naming the field, its value and what is allowed.
void check(const EmbedArgs& args);
void check(const RotaryArgs& args);
void check(const RmsNormArgs& args);
template <typename In>
void check(const RopeArgs<In>& args);
template <typename In>
void check(const SwigluArgs<In>& args);
void check(const ArgmaxArgs& args);

}  // namespace flowprefill
