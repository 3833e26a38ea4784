// PackedLinear: a weight matrix packed once at load into the micro-kernel's layout, and its
// products.
#pragma once

#include <cstdint>
#include <functional>

#include "devices/cpu/buffer.h"
#include "devices/cpu/gemm.h"
#include "devices/cpu/team.h"

namespace flowprefill {

// Weight [columns, depth] (as checkpoints store it), kept as blocks of 64 columns, each [depth, 64]
// packed.
template <typename T>
class PackedLinear {
 public:
  PackedLinear() = default;
  // depth must be even (Bf16 pairs).
  PackedLinear(int64_t depth, int64_t columns);

  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }
  int64_t blocks() const { return (columns_ + kPackColumns - 1) / kPackColumns; }
  size_t bytes() const { return packed_.bytes(); }
  int64_t block_columns(int64_t block) const;

  // Packs rows [0, rows) of `weight` (float, row-major [rows, depth]) as columns place(row).
  // Not thread-safe; at load only. Shares the rows out to the team.
  void pack(const float* weight, int64_t rows, Team& team,
            const std::function<int64_t(int64_t)>& place);

  // c[rows, columns of block] (+)= a[rows, depth] * W; c points at the block's first column.
  void multiply_block(int64_t block, int64_t rows, const T* a, int64_t lda, float* c, int64_t ldc,
                      bool add) const;

  // The same for blocks [begin, end) of a whole output c [rows, columns].
  void multiply(int64_t begin, int64_t end, int64_t rows, const T* a, int64_t lda, float* c,
                int64_t ldc, bool add) const;

 private:
  const T* block_data(int64_t block) const;

  int64_t depth_ = 0;
  int64_t columns_ = 0;
  Buffer packed_;
};

}  // namespace flowprefill
