// PlanShape: the sizes a plan is made for, and where its activations and inputs lie by them. Made
// by PlanBuilder, read by OperatorKernels and batch_inputs().
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "devices/cuda/kernels/attention_split.h"
#include "graph/key_chunks.h"
#include "graph/layout.h"
#include "graph/model_graph.h"

namespace flowprefill {

// Rows that attend in one launch: of the batch, and of the tile tensors.
struct AttentionRows {
  int32_t begin = 0;
  int32_t end = 0;
  int32_t base = 0;  // row that lies at the start of the tile tensors
  // Whether the operators have windows, and so no chunks; false where nothing has.
  bool is_windowed = false;
  auto operator<=>(const AttentionRows&) const = default;
};

// Rows or columns as the products want them.
constexpr int64_t padded_to_8(int64_t count) {
  return (count + 7) / 8 * 8;
}

// How a graph's activations lie in a lane.
LayoutRules lane_rules(const ModelGraph& graph);

// How a model's attention is cut on a device: into chunks of keys, and into launches whose partial
// results fit the scratch.
struct AttentionRules {
  // Least rows of a sequence, and least (row, query head) pairs of it for each multiprocessor, for
  // Hopper's kernel: up to 32k keys it splits none, so with fewer the portable one is faster.
  // Measured on an H200 with 32 heads: 256 rows on 8k tokens take 98 us, the portable kernel 306.
  static constexpr int32_t kHopperRows = 128;
  static constexpr int32_t kHopperQueries = 28;

  // multiprocessors: of the device; 0: keys are not split. uses_hopper: whether the device has
  // launch_attention_hopper().
  AttentionRules(const ModelGraph& graph, int32_t multiprocessors, int32_t block_tokens,
                 bool uses_hopper = false);

  // Whether a sequence of so many new rows has Hopper's kernel. That depends on nothing else.
  bool is_for_hopper(int32_t rows) const {
    const int64_t queries = int64_t{rows} * split.heads_per_kv * split.kv_heads;
    return uses_hopper && rows >= kHopperRows && queries >= kHopperQueries * split.multiprocessors;
  }

  // Of `rows` rows of a batch with block tables of table_stride blocks.
  AttentionNeeds needs(int32_t rows, int32_t sequences, int32_t table_stride) const;
  // Launches that share these among them, so that each has at most partial_rows().
  int32_t num_launches(const AttentionNeeds& needs) const;
  // Rows of partial results of one launch.
  int64_t partial_rows(const AttentionNeeds& needs) const;
  // Scratch of partial results of one launch.
  size_t scratch_bytes(const AttentionNeeds& needs) const;

  // Of Hopper's kernel: chunks that a row has at most; 1: block tables are too short for any.
  int32_t most_chunks(int32_t table_stride) const;
  // Rows with chunks that one launch of it has at most; 0: none has any.
  int32_t chunked_rows(int32_t rows, int32_t table_stride) const;
  // Rows of partial results of so many, and the scratch.
  int64_t partial_rows_of(int64_t chunked_rows, int32_t table_stride) const;
  size_t scratch_bytes_of(int64_t chunked_rows, int32_t table_stride) const;
  // The most that a launch needs of so many rows or fewer and block tables as long or shorter.
  size_t most_scratch_bytes_of(int64_t rows, int32_t table_stride) const;
  // What an operator of a step attends to.
  AttentionRows rows_of(const Step& step, const Operator& op, int32_t table_stride) const {
    const bool is_windowed = op.window > 0 && most_chunks(table_stride) > 1;
    return {step.row_begin, step.row_end, step.base, is_windowed};
  }

  AttentionSplit split = {};
  KeyChunks chunks = {};  // of Hopper's kernel
  int32_t head_dim = 0;
  int32_t block_tokens = 0;
  bool uses_hopper = false;
};

// The lists of one launch of attention: offsets into the inputs block, and counts that are the same
// in every run: the rest is padding.
struct AttentionLists {
  size_t tiles = 0;   // AttentionTile [num_tiles]
  size_t merges = 0;  // AttentionTile [num_merges]
  int32_t num_tiles = 0;
  int32_t num_merges = 0;
  int32_t num_whole = 0;  // tiles there are without chunks, at most
};

// The launches of one AttentionRows.
struct AttentionLaunches {
  std::vector<AttentionLists> lists;
  int32_t partial_rows = 0;               // of each
  std::vector<AttentionLists> row_lists;  // of launch_attention_hopper(); empty: it is not used
  int32_t chunked_rows = 0;               // rows with chunks that each of these has at most
  int32_t row_partial_rows = 0;           // of each of these

  // One for each list of tiles, and one for what merges their chunks.
  size_t num_kernels() const;
};

// Bytes of the inputs block; all int32 but for `sampling`.
struct InputLayout {
  // table_stride: KV blocks of a sequence's block table.
  InputLayout(const PlanSizes& sizes, int32_t table_stride, const AttentionRules& rules,
              const std::vector<AttentionRows>& attention);

  int32_t table_stride = 0;
  size_t tokens = 0;                         // [rows]
  size_t sequences = 0;                      // [rows] 1 + row of the block tables, 0: padding
  size_t positions = 0;                      // [rows]
  size_t last_rows = 0;                      // [sequences] a sequence's last row, -1: padding
  size_t next_tokens = 0;                    // [sequences] after the last row, -1: not known
  size_t block_tables = 0;                   // [sequences, table_stride]
  size_t sampling = 0;                       // SamplingParams [sequences]
  std::vector<AttentionLaunches> attention;  // of each AttentionRows
  size_t bytes = 0;

  // At least `bytes` of any plan of these sizes or smaller ones, whatever its slices.
  static size_t max_bytes(const ModelGraph& graph, const PlanSizes& sizes, int32_t table_stride,
                          const AttentionRules& rules);

 private:
  void add_row_lists(AttentionLaunches& launches, const AttentionRows& rows, int32_t most_sequences,
                     const AttentionRules& rules);
  size_t take_tiles(int32_t count);
};

struct PlanShape {
  // graph: lives as long as this.
  PlanShape(const ModelGraph& graph, const PlanSizes& sizes, int32_t table_stride,
            const AttentionRules& rules, std::vector<AttentionRows> attention);

  const PlanSizes& sizes() const { return lane.sizes(); }
  // Scratch of attention over any of its rows.
  size_t scratch_bytes() const;
  // Index into attention and inputs.attention.
  size_t attention_index(const Step& step, const Operator& op) const;

  const ModelGraph& graph;
  const AttentionRules rules;
  const std::vector<AttentionRows> attention;  // sorted
  const Layout lane;
  const InputLayout inputs;
};

}  // namespace flowprefill
