// What the fused epilogue of a gated product does with a piece of a row of accumulators. Called by
// GatedStore (gemm_gated_store.h) on the device and by tests/cpp/kernels on the host.
#pragma once

#include "devices/cuda/kernels/row_bodies.h"

namespace flowprefill {

struct GatedOutput {
  Bf16* d = nullptr;  // [rows, columns / 2]
  int64_t ldd = 0;
  const float* bias = nullptr;  // [columns] or null
  int32_t rows = 0;
  int32_t columns = 0;   // of the product: gate and up alternate
  bool is_gelu = false;  // GELU by tanh instead of SiLU
};

// Stores activation(gate) * up of the accumulators of one row, columns [column, column + kCount),
// each result rounded once. Nothing beyond rows and columns is touched. column and columns are
// multiples of kCount, so a piece is inside as a whole or not at all.
template <int kCount>
FP_HD void store_gated(const GatedOutput& out, int32_t row, int32_t column,
                       const float (&accumulators)[kCount]) {
  if (row >= out.rows || column >= out.columns)
    return;
  float x[kCount];
  FP_UNROLL for (int i = 0; i < kCount; ++i) x[i] = accumulators[i];
  if (out.bias != nullptr) {
    FP_UNROLL for (int i = 0; i < kCount; ++i) x[i] += out.bias[column + i];
  }
  Vec<Bf16, kCount / 2> y;
  FP_UNROLL for (int i = 0; i < kCount; i += 2) y.v[i / 2] =
      to_bf16(gated(out.is_gelu, x[i], x[i + 1]));
  *reinterpret_cast<Vec<Bf16, kCount / 2>*>(out.d + row * out.ldd + column / 2) = y;
}

}  // namespace flowprefill
