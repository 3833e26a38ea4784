// Arguments of the FP8 kernels, which stand around a product: rows are quantised before it, sums
// are scaled after it. Filled by gemm_fp8.cc, read by the bodies. Strides are in elements.
#pragma once

#include <cstdint>

#include "devices/cuda/kernels/fp8.h"
#include "devices/cuda/kernels/gemm_args.h"

namespace flowprefill {

// out[row] = in[row] / scales[row] in e4m3, where scales[row] = max |in[row]| / 448: by the row
// alone. A row with a NaN or an infinity has NaN among its codes, so all it is multiplied with is
// NaN.
struct QuantiseArgs {
  const Bf16* in = nullptr;  // [rows, width]
  int64_t ld_in = 0;         // a multiple of 8
  E4m3* out = nullptr;       // [rows, width]
  int64_t ld_out = 0;        // a multiple of 8
  float* scales = nullptr;   // [rows]
  int32_t rows = 0;
  int32_t width = 0;  // a multiple of 8
};

// out = in, which is exact: for products by kernels of bf16.
struct WidenArgs {
  const E4m3* in = nullptr;  // [rows, width]
  int64_t ld_in = 0;         // a multiple of 8
  Bf16* out = nullptr;       // [rows, width]
  int64_t ld_out = 0;        // a multiple of 8
  int32_t rows = 0;
  int32_t width = 0;  // a multiple of 8
};

// out = scale * row_scales * column_scales * in (+ bias) (+ out), rounded once; gated: as GemmArgs
// has it, columns 2i and 2i + 1 of `in` are gate and up.
struct RescaleArgs {
  const float* in = nullptr;             // [rows, columns]
  int64_t ld_in = 0;                     // a multiple of 8
  const float* row_scales = nullptr;     // [rows] or null: 1
  const float* column_scales = nullptr;  // [columns] or null: 1
  const float* bias = nullptr;           // [columns] or null
  void* out = nullptr;                   // float or Bf16 [rows, width()]
  int64_t ld_out = 0;                    // a multiple of 8
  GemmOutput output = GemmOutput::kFloat;
  bool adds_to_out = false;
  bool is_gated = false;  // bf16 output only, without adds_to_out
  bool is_gelu = false;
  float scale = 1;
  int32_t rows = 0;
  int32_t columns = 0;  // a multiple of 8; gated: of 16

  FP_HD int32_t width() const { return is_gated ? columns / 2 : columns; }
};

// Each throws std::invalid_argument naming the field, its value and what is allowed.
void check(const QuantiseArgs& args);
void check(const WidenArgs& args);
void check(const RescaleArgs& args);

}  // namespace flowprefill
