#include "devices/cpu/gate.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace flowprefill {
namespace {

// Rows that pass through all blocks at once.
template <typename T>
void multiply_some(CpuActivations<T>& a, const Operator& op, const Step& step, RowRange rows,
                   int64_t begin, int64_t end, const void* input) {
  const Linear<T>& linear = a.weights.matrix(op.weight);
  const float* bias = a.weights.vector(op.bias);
  const int32_t count = rows.end - rows.begin;
  const int32_t width_out = a.graph.output_of(op).columns;
  const auto activate =
      op.activation == Activation::kSilu ? row_kernels<T>().swiglu : row_kernels<T>().geglu;
  thread_local std::vector<float> memory;
  float* const product = line_of(memory, static_cast<size_t>(count) * kPackColumns);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t width = linear.block_columns(block);
    for (int32_t r = 0; bias != nullptr && r < count; ++r)
      std::copy_n(bias + block * kPackColumns, width, product + r * width);
    linear.multiply_block(block, end, count, input, product, width, bias != nullptr);
    activate(product, width, count, static_cast<int>(width / 2),
             a.template at<T>(op.output, step, rows.begin) + block * kGateColumns, width_out);
  }
}

}  // namespace

template <typename T>
void multiply_gate(CpuActivations<T>& a, const Operator& op, const Step& step, RowRange rows,
                   int64_t begin, int64_t end, const void* input) {
  const Linear<T>& linear = a.weights.matrix(op.weight);
  const int64_t count = rows.end - rows.begin;
  const size_t prepared = linear.prepared_row_bytes(count);
  const size_t row_bytes =
      prepared > 0 ? prepared : static_cast<size_t>(linear.depth()) * sizeof(T);
  const auto most = static_cast<int32_t>(linear.rows_at_once(count));
  const auto* of_row = static_cast<const std::byte*>(input);
  for (int32_t row = rows.begin; row < rows.end; row += most) {
    multiply_some(a, op, step, {row, std::min(row + most, rows.end)}, begin, end, of_row);
    of_row += row_bytes * static_cast<size_t>(most);
  }
  linear.end_series();
}

template void multiply_gate<float>(CpuActivations<float>&, const Operator&, const Step&, RowRange,
                                   int64_t, int64_t, const void*);
template void multiply_gate<Bf16>(CpuActivations<Bf16>&, const Operator&, const Step&, RowRange,
                                  int64_t, int64_t, const void*);

}  // namespace flowprefill
