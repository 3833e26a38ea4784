// Arguments of the row kernels: raw pointers and strides, in elements. Filled by OperatorKernels,
// which launches them (kernels.h), read by the bodies. Every ld_* is the distance between rows.
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
  float scale = 1;    // multiplies the table's values
};

struct RotaryArgs {
  BatchView batch = {};                        // sequences, positions
  const double* turns_per_position = nullptr;  // [turning / 2] inverse frequency / (2 pi)
  float scale = 0;                             // multiplies cos and sin (yarn)
  float* rotary = nullptr;                     // [rows, turning] cos | sin, dense
  int32_t rows = 0;
  int32_t turning = 0;  // dimensions of a head that turn, even
};

template <typename Out>  // float or Bf16
struct RmsNormArgs {
  const float* hidden = nullptr;
  int64_t ld_hidden = 0;
  const float* weight = nullptr;     // [width]
  const int32_t* rows_in = nullptr;  // [rows] which row of hidden, -1: padding; null: row i is i
  Out* out = nullptr;                // [rows, width]
  int64_t ld_out = 0;
  int32_t rows = 0;
  int32_t width = 0;  // a multiple of 4, as the strides
  float eps = 0;
};

struct ResidualArgs {
  const float* in = nullptr;  // [rows, width]
  int64_t ld_in = 0;
  const float* weight = nullptr;  // [width] of a norm that `in` passes, or null
  float* hidden = nullptr;        // [rows, width] gets the sum
  int64_t ld_hidden = 0;
  int32_t rows = 0;
  int32_t width = 0;  // a multiple of 4, as the strides
  float scale = 1;
  float eps = 0;
};

struct RoundArgs {
  const float* in = nullptr;  // [rows, width]
  int64_t ld_in = 0;
  Bf16* out = nullptr;  // [rows, width]
  int64_t ld_out = 0;
  int32_t rows = 0;
  int32_t width = 0;  // a multiple of 8, as the strides
};

struct SoftcapArgs {
  float* values = nullptr;  // [rows, width]
  int64_t ld_values = 0;
  int32_t rows = 0;
  int32_t width = 0;  // a multiple of 4, as the stride
  float cap = 0;      // above 0
};

// Pointers are multiples of 8 bytes, strides of 2 elements: a lane moves two at once.
template <typename In>  // float or Bf16: what the qkv product was rounded to
struct RopeArgs {
  BatchView batch = {};     // sequences, positions, block_tables
  const In* qkv = nullptr;  // [rows, (heads + 2 * kv_heads) * head_dim] queries | keys | values
  int64_t ld_qkv = 0;
  const float* bias = nullptr;    // [columns of qkv] or null (also null if the product added it)
  const float* q_norm = nullptr;  // [head_dim] or null; norms_rows: [heads * head_dim]
  const float* k_norm = nullptr;  // the same of kv_heads
  const float* rotary = nullptr;  // [rows, turning] of RotaryArgs
  Bf16* q = nullptr;              // [rows, heads * head_dim]
  int64_t ld_q = 0;
  CacheView cache = {};
  float q_scale = 0;  // log2(e) / sqrt(head_dim): attention works in base 2
  float eps = 0;
  int32_t rows = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;     // a multiple of 4, at most 256
  int32_t turning = 0;      // dimensions that turn, the first ones: a multiple of 4
  bool norms_rows = false;  // q_norm and k_norm are of all heads of a row at once
};

template <typename In>  // float or Bf16
struct GateArgs {
  const In* in = nullptr;  // [rows, 2 * width]: gate 0, up 0, gate 1, up 1, ...
  int64_t ld_in = 0;
  Bf16* out = nullptr;  // [rows, width]
  int64_t ld_out = 0;
  int32_t rows = 0;
  int32_t width = 0;     // a multiple of 8, as the strides
  bool is_gelu = false;  // GELU by tanh instead of SiLU
};

// Each throws std::invalid_argument naming the field, its value and what is allowed.
void check(const EmbedArgs& args);
void check(const RotaryArgs& args);
template <typename Out>
void check(const RmsNormArgs<Out>& args);
void check(const ResidualArgs& args);
void check(const RoundArgs& args);
void check(const SoftcapArgs& args);
template <typename In>
void check(const RopeArgs<In>& args);
template <typename In>
void check(const GateArgs<In>& args);

}  // namespace flowprefill
