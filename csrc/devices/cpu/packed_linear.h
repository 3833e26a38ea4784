// PackedLinear: a weight matrix in the activations' own type, packed once at load into the
// micro-kernel's layout.
#pragma once

#include <cstdint>
#include <functional>

#include "devices/cpu/buffer.h"
#include "devices/cpu/linear.h"

namespace flowprefill {

// Kept as blocks of 64 columns, each [depth, 64] packed.
template <typename T>
class PackedLinear final : public Linear<T> {
 public:
  // depth must be even (Bf16 pairs).
  PackedLinear(int64_t depth, int64_t columns);

  size_t bytes() const override { return packed_.bytes(); }
  int64_t rows_at_once(int64_t rows) const override;
  void pack(const float* weight, int64_t rows, Team& team,
            const std::function<int64_t(int64_t)>& place) override;
  void multiply_block(int64_t block, int64_t end, int64_t rows, const void* input, float* c,
                      int64_t ldc, bool add) const override;
  void multiply_blocks(int64_t begin, int64_t end, int64_t rows, const void* input, float* c,
                       int64_t ldc, bool add) const override;
  void end_series() const override;

 private:
  // A part of the depth, from `first` on, on AMX tiles.
  void multiply_by_tiles(int64_t block, int64_t first, int64_t depth, int64_t rows, const T* a,
                         float* c, int64_t ldc, bool add, const T* ahead) const;

  Buffer packed_;
};

}  // namespace flowprefill
