// Linear: a weight matrix in the form in which the CPU multiplies it. Implementations:
// PackedLinear, Int8Linear, BlockLinear; chosen for each weight by the backend, filled by
// CpuWeights, used by CpuOperators.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "devices/cpu/row_kernels.h"
#include "devices/cpu/team.h"
#include "graph/model_graph.h"

namespace flowprefill {

// Columns of one block of a weight matrix: of a part of its product.
inline constexpr int kPackColumns = kPartColumns;

// Weight [columns, depth] (as checkpoints store it). Products are made by blocks of 64 columns, for
// any rows and blocks in any order and on any threads: an element of the result has the same bits
// however the work is cut. (BlockLinear's differ by rounding between few rows and many at once; how
// many there are, a run's plan fixes.)
template <typename T>  // T: float or Bf16, the element type of activations
class Linear {
 public:
  Linear(int64_t depth, int64_t columns) : depth_(depth), columns_(columns) {}
  virtual ~Linear() = default;
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;

  int64_t depth() const { return depth_; }
  int64_t columns() const { return columns_; }
  int64_t blocks() const { return (columns_ + kPackColumns - 1) / kPackColumns; }
  int64_t block_columns(int64_t block) const {
    return std::min<int64_t>(kPackColumns, columns_ - block * kPackColumns);
  }
  // Memory of the weights.
  virtual size_t bytes() const = 0;

  // Takes rows [0, rows) of `weight` (float, row-major [rows, depth]) as columns place(row).
  // Not thread-safe; at load only. Shares the rows out to the team.
  virtual void pack(const float* weight, int64_t rows, Team& team,
                    const std::function<int64_t(int64_t)>& place) = 0;

  // Bytes of one row of the input in the form that products of so many rows read, if they want one
  // of their own (quantised, say); 0: they read rows of T. There is one such form.
  virtual size_t prepared_row_bytes(int64_t /*rows*/) const { return 0; }
  // Brings rows of the input, T [rows, depth], into that form; one row depends on no other.
  virtual void prepare(int64_t /*rows*/, const T* /*input*/, void* /*prepared*/) const {}

  // How many of so many rows a caller should pass through all its blocks at once: those whose input
  // stays in L2 meanwhile.
  virtual int64_t rows_at_once(int64_t rows) const { return rows; }

  // c[rows, columns of block] (+)= input * W; c points at the block's first column. input: prepared
  // rows, or T [rows, depth] where there is no such form. Blocks up to `end` are the caller's next:
  // their weights may be asked for meanwhile.
  virtual void multiply_block(int64_t block, int64_t end, int64_t rows, const void* input, float* c,
                              int64_t ldc, bool add) const = 0;
  // Ends a series of multiply_block calls on this thread.
  virtual void end_series() const {}

  // The same for blocks [begin, end) of a whole output c [rows, columns], a series of its own.
  void multiply(int64_t begin, int64_t end, int64_t rows, const void* input, float* c, int64_t ldc,
                bool add) const {
    multiply_blocks(begin, end, rows, input, c, ldc, add);
    end_series();
  }

 protected:
  virtual void multiply_blocks(int64_t begin, int64_t end, int64_t rows, const void* input,
                               float* c, int64_t ldc, bool add) const {
    for (int64_t block = begin; block < end; ++block)
      multiply_block(block, end, rows, input, c + block * kPackColumns, ldc, add);
  }

 private:
  const int64_t depth_;
  const int64_t columns_;
};

// Makes the empty matrix of weight number `weight` of the graph.
template <typename T>
using MakeLinear =
    std::function<std::unique_ptr<Linear<T>>(const ModelGraph& graph, int32_t weight)>;

}  // namespace flowprefill
