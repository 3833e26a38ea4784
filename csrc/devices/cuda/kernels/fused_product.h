// FusedProduct: a product of few rows with the norm before it and the rope behind it, as one
// kernel. Filled by OperatorKernels where a step decodes; computed by few_rows_body().
//
// Alone, each of these small operators takes as long as a kernel takes to start and to end, and
// meanwhile no weights are read. Results have the bits of the three kernels.
#pragma once

#include <cstddef>

#include "devices/cuda/kernels/gemm_args.h"
#include "devices/cuda/kernels/row_args.h"

namespace flowprefill {

// Rows of the residual stream, whose norms are multiplied: as RmsNormArgs has them.
struct NormedRows {
  const float* hidden = nullptr;  // [rows, depth] of the product
  int64_t ld_hidden = 0;
  const float* weight = nullptr;
  float eps = 0;
};

struct FusedProduct {
  GemmArgs product;
  NormedRows norm = {};      // in place of product.a; hidden null: there is an `a`
  RopeArgs<Bf16> rope = {};  // of what is product.d else, and is not written; q null: d is stored

  bool has_norm() const { return norm.hidden != nullptr; }
  bool has_rope() const { return rope.q != nullptr; }
};

inline constexpr size_t kNormSumsBytes = 32;  // of a sum over a block of 8 warps
// Shared memory for the norms of the product's rows: that, then the rows.
size_t normed_bytes(const GemmArgs& product);

// Whether the kernel of few rows takes this: weights in bf16, and what is below.
bool can_fuse(const GemmArgs& product);
// Every block norms all rows anew: two at most, and as wide as there is room for in shared memory.
bool can_fuse_norm(const GemmArgs& product);
// All dimensions turn, no head is normed; the product is stored as it is.
bool can_fuse_rope(const GemmArgs& product, const RopeArgs<Bf16>& rope);

// Throws std::invalid_argument naming the field, its value and what is allowed.
void check(const FusedProduct& args);

}  // namespace flowprefill
