// BlockLinear: a weight matrix that stays in GGUF's quantised blocks. Many rows: a block of columns
// is unpacked into cache once and multiplied by the matrix kernel. Few rows, which cost no more
// than reading the weights: the blocks are multiplied as they are.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "devices/cpu/block_matrix.h"
#include "devices/cpu/linear.h"

namespace flowprefill {

// Up to so many rows are few: their products do not round the weights to T, so they differ from
// those of many rows by that rounding. How many rows a product has at once is fixed by a run's
// plan.
template <typename T>
inline constexpr int64_t kDirectRows = sizeof(T) == sizeof(Bf16) ? 16 : 4;

template <typename T>
class BlockLinear final : public Linear<T> {
 public:
  BlockLinear(std::shared_ptr<const BlockMatrix> matrix, int64_t columns)
      : Linear<T>(matrix->depth(), columns), matrix_(std::move(matrix)) {}

  size_t bytes() const override { return matrix_->bytes(); }
  // Throws std::logic_error: BlockMatrix takes its rows as blocks.
  void pack(const float* weight, int64_t rows, Team& team,
            const std::function<int64_t(int64_t)>& place) override;
  size_t prepared_row_bytes(int64_t rows) const override;
  void prepare(int64_t rows, const T* input, void* prepared) const override;
  void multiply_block(int64_t block, int64_t end, int64_t rows, const void* input, float* c,
                      int64_t ldc, bool add) const override;
  void end_series() const override;

 private:
  void multiply_few(int64_t block, int64_t rows, const void* input, float* c, int64_t ldc,
                    bool add) const;

  const std::shared_ptr<const BlockMatrix> matrix_;
};

}  // namespace flowprefill
