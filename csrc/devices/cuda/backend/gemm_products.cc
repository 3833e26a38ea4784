#include "devices/cuda/backend/gemm_products.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "devices/cuda/backend/operator_kernels.h"

namespace flowprefill {
namespace {

constexpr size_t kMeasured = 8;  // of one size, taking turns, so that weights come from memory

// The classes up to `most`, and `most` itself for the one that it lies in.
std::vector<int32_t> row_counts(int32_t most) {
  std::vector<int32_t> counts;
  for (const int32_t rows : kRowClasses) {
    if (counts.empty() || counts.back() < most)
      counts.push_back(std::min(rows, most));
  }
  return counts;
}

// The whole products, as steps, of as many rows as can be; at most `most_alike` of one size.
std::vector<Step> products(const PlanShape& largest, const DeviceWeights& weights,
                           size_t most_alike) {
  const ModelGraph& graph = largest.graph;
  std::map<std::tuple<int64_t, int64_t, Epilogue, ElementType, bool, Extent, bool>, size_t> alike;
  std::vector<Step> steps;
  for (int32_t i = 0; i < static_cast<int32_t>(graph.operators.size()); ++i) {
    const Operator& op = graph.op(i);
    if (op.kind != OperatorKind::kLinear)
      continue;
    const Weight& weight = graph.weights.weight(op.weight);
    const Tensor& output = graph.output_of(op);
    if (++alike[{weight.rows(), weight.columns, op.epilogue, output.type, op.bias >= 0,
                 output.extent, weights.is_fp8(op.weight)}] > most_alike)
      continue;
    const PlanSizes& sizes = largest.sizes();
    const bool is_sequence = output.extent == Extent::kSequence;
    steps.push_back({.first = i, .last = i, .row_end = is_sequence ? sizes.sequences : sizes.rows});
  }
  return steps;
}

}  // namespace

size_t scratch_bytes(const GemmSelector& gemms, const PlanShape& largest,
                     const DeviceWeights& weights) {
  size_t bytes = 0;
  for (const Step& step : products(largest, weights, 1)) {
    bytes = std::max(bytes, gemms.scratch_bytes(OperatorKernels::product(
                                largest, weights, step, OperatorKernels::nowhere())));
  }
  return bytes;
}

std::vector<GemmArgs> products_to_choose(const PlanShape& largest, const DeviceWeights& weights,
                                         std::byte* lane) {
  std::vector<GemmArgs> chosen;
  for (const Step& step : products(largest, weights, kMeasured)) {
    GemmArgs args = OperatorKernels::product(largest, weights, step, lane);
    for (const int32_t rows : row_counts(step.rows())) {
      args.operator_rows = args.row_end = rows;
      chosen.push_back(args);
    }
  }
  return chosen;
}

}  // namespace flowprefill
