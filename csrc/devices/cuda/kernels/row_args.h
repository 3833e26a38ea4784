// Arguments of the row kernels: raw pointers and strides, in elements. Filled by whoever launches
// (kernels.h), read by the bodies. Every ld_* is the distance between rows.
#pragma once

#include "devices/cuda/kernels/batch_view.h"

namespace flowprefill {

struct EmbedArgs {
  BatchView batch = {};         // tokens, sequences
  const Bf16* table = nullptr;  // [vocab, width]
  int64_t ld_table = 0;         // a multiple of 8
  float* hidden = nullptr;      // [rows, width] the residual stream
  int64_t ld_hidden = 0;        // a multiple of 4
  int32_t rows = 0;
  int32_t width = 0;  // a multiple of 8
};

struct RotaryArgs {
  BatchView batch = {};                        // sequences, positions
  const double* turns_per_position = nullptr;  // [head_dim / 2] inverse frequency / (2 pi)
  float scale = 0;                             // multiplies cos and sin (yarn)
  float* rotary = nullptr;                     // [rows, head_dim] cos | sin, dense
  int32_t rows = 0;
  int32_t head_dim = 0;  // even
};

struct RmsNormArgs {
  float* hidden = nullptr;  // read; written only where there is a delta
  int64_t ld_hidden = 0;
  const float* delta = nullptr;  // [rows, width] added to hidden first, or null
  int64_t ld_delta = 0;
  const float* weight = nullptr;     // [width]
  const int32_t* rows_in = nullptr;  // [rows] which row of hidden, -1: padding; null: row i is i
  Bf16* out = nullptr;               // [rows, width]
  int64_t ld_out = 0;
  int32_t rows = 0;
  int32_t width = 0;  // a multiple of 4, as the strides
  float eps = 0;
};

// Pointers are multiples of 8 bytes, strides of 2 elements: a lane moves two at once.
template <typename In>  // float or Bf16: what the qkv product was rounded to
struct RopeArgs {
  BatchView batch = {};     // sequences, positions, block_tables
  const In* qkv = nullptr;  // [rows, (heads + 2 * kv_heads) * head_dim] queries | keys | values
  int64_t ld_qkv = 0;
  const float* bias = nullptr;    // [columns of qkv] or null (also null if the product added it)
  const float* q_norm = nullptr;  // [head_dim] or null
  const float* k_norm = nullptr;
  const float* rotary = nullptr;  // [rows, head_dim] of RotaryArgs
  Bf16* q = nullptr;              // [rows, heads * head_dim]
  int64_t ld_q = 0;
  CacheView cache = {};
  float q_scale = 0;  // log2(e) / sqrt(head_dim): attention works in base 2
  float eps = 0;
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;  // a multiple of 4, at most 256
};

template <typename In>  // float or Bf16
struct SwigluArgs {
  const In* in = nullptr;  // [rows, 2 * width]: gate 0, up 0, gate 1, up 1, ...
  int64_t ld_in = 0;
  Bf16* out = nullptr;  // [rows, width]
  int64_t ld_out = 0;
  int32_t rows = 0;
  int32_t width = 0;  // a multiple of 8, as the strides
};

struct ArgmaxArgs {
  const float* values = nullptr;  // [rows, width]
  int64_t ld_values = 0;
  int32_t* out = nullptr;  // [rows]
  int32_t rows = 0;
  int32_t width = 0;
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
