// GemmArgs and GemmTile: one matrix product with its fused epilogue, and which kernel computes it.
// Filled by OperatorKernels and host tests, read by the launches in gemm_*.cu.
#pragma once

#include <cstdint>
#include <vector>

#include "devices/cuda/kernels/fp8.h"
#include "devices/cuda/kernels/portable.h"

namespace flowprefill {

enum class GemmOutput : uint8_t { kFloat, kBf16 };

// Weights in e4m3, in place of GemmArgs::b: row i is scales[i] * b[i]. What is multiplied with them
// is quantised by rows: from GemmArgs::a, unless `a` is it already (dense, GemmArgs::lda apart).
struct Fp8Operands {
  const E4m3* b = nullptr;          // [columns, depth], 16-byte aligned; null: b is bf16
  const float* b_scales = nullptr;  // [columns], 16-byte aligned
  const E4m3* a = nullptr;          // [>= row_end, depth], 16-byte aligned, or null
  const float* a_scales = nullptr;  // [>= row_end], or null: neither scale is multiplied with
};

// d[rows, columns] = scale * a * b^T (+ bias) (+ d). Rows [row_begin, row_end) of a and d only: a
// slice of a longer operator. Products are exact, sums and epilogue are float, d is rounded once at
// the end.
//
// Gated: rows 2i and 2i + 1 of b (and entries of bias) are the gate and the up projection of column
// i, and d[rows, columns / 2] = silu(gate) * up, or gelu(gate) * up with GELU by tanh.
struct GemmArgs {
  const Bf16* a = nullptr;      // [>= row_end, depth] row-major, 16-byte aligned
  int64_t lda = 0;              // elements between rows, a multiple of 8
  const Bf16* b = nullptr;      // [columns, depth], as checkpoints store it, 16-byte aligned
  Fp8Operands fp8 = {};         // in place of b (and a): depth, columns and ldb multiples of 16
  int64_t ldb = 0;              // elements between rows, a multiple of 8
  const float* bias = nullptr;  // [columns] or null
  void* d = nullptr;            // float or Bf16 [>= row_end, d_columns()], 16-byte aligned
  int64_t ldd = 0;              // elements between rows, a multiple of 16 bytes
  GemmOutput output = GemmOutput::kFloat;
  bool adds_to_d = false;  // the residual stream: d += ...
  bool is_gated = false;   // bf16 output only, without adds_to_d and scale
  bool is_gelu = false;    // where gated
  bool b_is_made = false;  // a kernel wrote b in the same stream: not to be read before it ended
  float scale = 1;
  int32_t row_begin = 0;
  int32_t row_end = 0;
  int32_t columns = 0;  // rows of b; d_columns() is a multiple of 16 bytes of d
  int32_t depth = 0;    // a multiple of 8
  // Of the operator that this is a slice of: its kernel is chosen by them, so that all slices are
  // computed alike. 0: as many as here.
  int32_t operator_rows = 0;
  int32_t operator_columns = 0;

  bool is_fp8() const { return fp8.b != nullptr; }
  FP_HD int32_t rows() const { return row_end - row_begin; }
  int32_t whole_rows() const { return operator_rows > 0 ? operator_rows : rows(); }
  int32_t whole_columns() const { return operator_columns > 0 ? operator_columns : columns; }
  FP_HD int32_t d_columns() const { return is_gated ? columns / 2 : columns; }
  FP_HD const Bf16* first_a() const { return a + row_begin * lda; }
  // d at the first row of the slice, as T (float or Bf16).
  template <typename T>
  FP_HD T* first_d() const {
    return static_cast<T*>(d) + row_begin * ldd;
  }
};

// Rows x columns that one block of threads computes.
enum class GemmTile : uint8_t {
  kFewRows,        // at most kMostFewRows rows, as fast as the weights can be read
  kAmpere64x64,    // few rows or columns: more blocks than a wider tile gives
  kAmpere128x128,  // the default of compute capability 8.x and of everything without an own kernel
  kAmpere256x128,  // long prompts: half the reads of the weights
  kHopper128x256,  // compute capability 9.0 only: TMA and warp-group matrix instructions
};

inline constexpr int32_t kMostFewRows = 16;

const char* gemm_tile_name(GemmTile tile);

// Which kernels take these arguments on a device of this compute capability (major * 10 + minor),
// best guess first.
// The order is a guess by blocks per multiprocessor; GemmSelector can measure which is fastest.
// Empty below 80.
std::vector<GemmTile> gemm_tiles(const GemmArgs& args, int compute_capability,
                                 int num_multiprocessors);

// Throws std::invalid_argument naming the field, its value and what is allowed.
void check(const GemmArgs& args);
// As check(), of what launch_gemm() takes: no more rows than the tile has; weights in bf16, or for
// few_rows in FP8 with rows that are quantised already.
void check_tile(const GemmArgs& args, GemmTile tile);

}  // namespace flowprefill
