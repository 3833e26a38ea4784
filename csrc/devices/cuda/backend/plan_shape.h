// PlanShape: the sizes a plan is made for, and where its activations and inputs lie by them. Made
// by PlanBuilder, read by OperatorKernels and batch_inputs().
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "graph/layout.h"
#include "graph/model_graph.h"

namespace flowprefill {

// Rows that attend in one launch: of the batch, and of the tile tensors.
struct AttentionRows {
  int32_t begin = 0;
  int32_t end = 0;
  int32_t base = 0;  // row that lies at the start of the tile tensors
  auto operator<=>(const AttentionRows&) const = default;
};

// Rows or columns as the products want them.
constexpr int64_t padded_to_8(int64_t count) {
  return (count + 7) / 8 * 8;
}

// How a graph's activations lie in a lane.
LayoutRules lane_rules(const ModelGraph& graph);

// Bytes of the inputs block; all int32 but for `sampling`.
struct InputLayout {
  // table_stride: KV blocks of a sequence's block table.
  InputLayout(const ModelGraph& graph, const PlanSizes& sizes, int32_t table_stride,
              const std::vector<AttentionRows>& attention);

  int32_t table_stride = 0;
  size_t tokens = 0;               // [rows]
  size_t sequences = 0;            // [rows] 1 + row of the block tables, 0: padding
  size_t positions = 0;            // [rows]
  size_t last_rows = 0;            // [sequences] a sequence's last row, -1: padding
  size_t block_tables = 0;         // [sequences, table_stride]
  size_t sampling = 0;             // SamplingParams [sequences]
  std::vector<size_t> tiles;       // of each AttentionRows: AttentionTile [num_tiles]
  std::vector<int32_t> num_tiles;  // that many in every run: the rest is padding
  size_t bytes = 0;

  // At least `bytes` of any plan of these sizes or smaller ones, whatever its slices.
  static size_t max_bytes(const ModelGraph& graph, const PlanSizes& sizes, int32_t table_stride);
};

struct PlanShape {
  // graph: lives as long as this.
  PlanShape(const ModelGraph& graph, const PlanSizes& sizes, int32_t table_stride,
            std::vector<AttentionRows> attention);

  const PlanSizes& sizes() const { return lane.sizes(); }
  // Index into attention, inputs.tiles and inputs.num_tiles.
  size_t attention_index(const Step& step) const;

  const ModelGraph& graph;
  const std::vector<AttentionRows> attention;  // sorted
  const Layout lane;
  const InputLayout inputs;
};

}  // namespace flowprefill
