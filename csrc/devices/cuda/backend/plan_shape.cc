#include "devices/cuda/backend/plan_shape.h"

#include <algorithm>
#include <set>
#include <utility>

#include "devices/cuda/kernels/attention_args.h"
#include "graph/sampling_params.h"

namespace flowprefill {
namespace {

constexpr size_t kAlignment = 256;

// Gives out one place after another.
class Arena {
 public:
  size_t take(int64_t count, size_t element_bytes) {
    const size_t place = end_;
    const size_t bytes = static_cast<size_t>(count) * element_bytes;
    end_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return place;
  }
  size_t end() const { return end_; }

 private:
  size_t end_ = 0;
};

size_t different_windows(const ModelGraph& graph) {
  std::set<int32_t> windows;
  for (const Operator& op : graph.operators) {
    if (op.kind == OperatorKind::kAttention)
      windows.insert(op.window);
  }
  return windows.size();
}

}  // namespace

LayoutRules lane_rules(const ModelGraph& graph) {
  return {.elements = {.activation = 2, .product = 2},
          .alignment = kAlignment,
          .logits_stride = static_cast<int32_t>(padded_to_8(graph.vocab_size))};
}

InputLayout::InputLayout(const ModelGraph& graph, const PlanSizes& sizes, int32_t stride,
                         const std::vector<AttentionRows>& attention)
    : table_stride(stride) {
  Arena block;
  tokens = block.take(sizes.rows, sizeof(int32_t));
  sequences = block.take(sizes.rows, sizeof(int32_t));
  positions = block.take(sizes.rows, sizeof(int32_t));
  last_rows = block.take(sizes.sequences, sizeof(int32_t));
  block_tables = block.take(int64_t{sizes.sequences} * stride, sizeof(int32_t));
  sampling = block.take(sizes.sequences, sizeof(SamplingParams));
  bytes = block.end();
  for (const AttentionRows& rows : attention) {
    num_tiles.push_back(max_attention_tiles(rows.end - rows.begin, sizes.sequences,
                                            graph.attention.heads_per_kv()));
    tiles.push_back(bytes);
    bytes += static_cast<size_t>(num_tiles.back()) * sizeof(AttentionTile);
  }
}

// Slices have at least one row each and leave at most one tile per row unfilled; layers of one
// window have the same slices.
size_t InputLayout::max_bytes(const ModelGraph& graph, const PlanSizes& sizes,
                              int32_t table_stride) {
  const size_t without_tiles = InputLayout(graph, sizes, table_stride, {}).bytes;
  const int64_t entries = int64_t{sizes.rows} * graph.attention.heads_per_kv();
  const auto tiles = static_cast<size_t>(entries / kAttentionEntries + sizes.rows);
  return without_tiles + different_windows(graph) * tiles * sizeof(AttentionTile);
}

PlanShape::PlanShape(const ModelGraph& model, const PlanSizes& sizes, int32_t table_stride,
                     std::vector<AttentionRows> attention_rows)
    : graph(model),
      attention(std::move(attention_rows)),
      lane(model, lane_rules(model), sizes),
      inputs(model, sizes, table_stride, attention) {}

size_t PlanShape::attention_index(const Step& step) const {
  const AttentionRows rows{.begin = step.row_begin, .end = step.row_end, .base = step.base};
  return static_cast<size_t>(std::ranges::lower_bound(attention, rows) - attention.begin());
}

}  // namespace flowprefill
