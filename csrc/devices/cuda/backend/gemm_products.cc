#include "devices/cuda/backend/gemm_products.h"

#include <algorithm>

#include "devices/cuda/backend/layer_kernels.h"

namespace flowprefill {
namespace {

constexpr int32_t kMeasuredLayers = 8;  // taking turns, so that weights come from memory
constexpr Op kProducts[] = {Op::kQkv, Op::kOutput, Op::kGateUp, Op::kDown};

// 1, 2, 4, ..., and `most` itself.
std::vector<int32_t> row_counts(int32_t most) {
  std::vector<int32_t> counts;
  for (int64_t rows = 1; rows < most; rows *= 2)
    counts.push_back(static_cast<int32_t>(rows));
  counts.push_back(most);
  return counts;
}

Step step_of(Op op, int32_t layer, int32_t end) {
  return {.first = op, .last = op, .layer = layer, .row_begin = 0, .row_end = end};
}

// The head for `sequences` rows, over the whole vocabulary.
GemmArgs head(const PlanShape& shape, const DeviceWeights& weights, int32_t sequences,
              std::byte* lane) {
  GemmArgs args = LayerKernels::product(
      shape, weights, Op::kHead, step_of(Op::kHead, 0, (shape.padded_vocab + 63) / 64), lane);
  args.row_end = sequences;
  return args;
}

// What is asked by shape alone never reads or writes there.
std::byte* nowhere() {
  return reinterpret_cast<std::byte*>(uintptr_t{1} << 30);
}

}  // namespace

size_t scratch_bytes(const GemmSelector& gemms, const PlanShape& largest,
                     const DeviceWeights& weights) {
  size_t bytes = 0;
  for (const int32_t rows : row_counts(largest.sizes.rows)) {
    for (const Op op : kProducts) {
      const GemmArgs args =
          LayerKernels::product(largest, weights, op, step_of(op, 0, rows), nowhere());
      bytes = std::max(bytes, gemms.scratch_bytes(args));
    }
  }
  for (const int32_t sequences : row_counts(largest.sizes.sequences))
    bytes = std::max(bytes, gemms.scratch_bytes(head(largest, weights, sequences, nowhere())));
  return bytes;
}

std::vector<GemmArgs> products_to_measure(const PlanShape& largest, const DeviceWeights& weights,
                                          std::byte* lane) {
  std::vector<GemmArgs> products;
  const int32_t layers = std::min(largest.config.num_layers, kMeasuredLayers);
  for (const int32_t rows : row_counts(largest.sizes.rows)) {
    for (const Op op : kProducts) {
      for (int32_t layer = 0; layer < layers; ++layer)
        products.push_back(
            LayerKernels::product(largest, weights, op, step_of(op, layer, rows), lane));
    }
  }
  for (const int32_t sequences : row_counts(largest.sizes.sequences))
    products.push_back(head(largest, weights, sequences, lane));
  return products;
}

}  // namespace flowprefill
