// Int8Linear: a weight matrix in 8 bits, a scale for each column, multiplied with rows in 8 bits, a
// scale for each row: by VNNI or AMX, summed exactly in 32 bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "devices/cpu/buffer.h"
#include "devices/cpu/linear.h"

namespace flowprefill {

// Weights and inputs are rotated before they are rounded (isa_int8.h), weights at load. Kept as
// blocks of 64 columns, each [depth / 4, 64, 4].
template <typename T>
class Int8Linear final : public Linear<T> {
 public:
  // Throws std::invalid_argument: so deep that a sum might not fit 32 bits.
  Int8Linear(int64_t depth, int64_t columns);

  size_t bytes() const override;
  void pack(const float* weight, int64_t rows, Team& team,
            const std::function<int64_t(int64_t)>& place) override;
  size_t prepared_row_bytes(int64_t rows) const override;
  void prepare(int64_t rows, const T* input, void* prepared) const override;
  void multiply_block(int64_t block, int64_t end, int64_t rows, const void* input, float* c,
                      int64_t ldc, bool add) const override;
  void end_series() const override;

 private:
  // Sums [rows, columns of block] of products of bytes.
  void multiply_by_tiles(int64_t block, bool asks_for_next, int64_t rows, const uint8_t* a,
                         int64_t stride, int32_t* sums) const;
  void multiply_rows(int64_t block, int64_t rows, const uint8_t* a, int64_t stride,
                     int32_t* sums) const;

  const int64_t padded_depth_;  // in whole runs of the rotation; what is added is zero
  Buffer packed_;
  std::vector<float> scales_;    // of columns
  std::vector<int32_t> shifts_;  // of columns: what kByteZero in every input adds to a product
};

}  // namespace flowprefill
