// PlanShape: the sizes a plan is made for, and where its activations and inputs lie by them. Made
// by PlanBuilder, read by LayerKernels and BatchInputs.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "graph/live_set.h"
#include "graph/model_config.h"
#include "graph/planner.h"

namespace flowprefill {

// Rows that attend in one launch: of the batch, and of the tile buffers.
struct AttentionRows {
  int32_t begin = 0;
  int32_t end = 0;
  int32_t base = 0;  // row that lies at the start of the tile buffers
  auto operator<=>(const AttentionRows&) const = default;
};

struct PlanSizes {
  int32_t rows = 0;          // of the batch, padding included
  int32_t tile_rows = 0;     // rows the tile buffers hold
  int32_t sequences = 0;     // padding included
  int32_t table_stride = 0;  // KV blocks of a sequence's block table
  auto operator<=>(const PlanSizes&) const = default;
};

// Bytes of a lane. Buffers that are never alive together lie on one another: normed and context,
// and gated on qkv and q.
struct LaneLayout {
  LaneLayout(const ModelConfig& config, int32_t padded_vocab, const PlanSizes& sizes);

  size_t hidden = 0;   // float [rows, hidden] the residual stream
  size_t rotary = 0;   // float [rows, head_dim] cos | sin
  size_t normed = 0;   // bf16 [tile_rows, hidden]
  size_t context = 0;  // bf16 [tile_rows, q columns] attention's output
  size_t qkv = 0;      // bf16 [tile_rows, qkv columns]
  size_t q = 0;        // bf16 [tile_rows, q columns]
  size_t gated = 0;    // bf16 [tile_rows, intermediate]
  size_t last = 0;     // bf16 [sequences, hidden] normed last rows
  size_t tokens = 0;   // int32 [sequences] the chosen ones
  size_t logits = 0;   // float [sequences, padded vocabulary]
  size_t bytes = 0;
};

// Bytes of the inputs block; all int32 but for `sampling`.
struct InputLayout {
  InputLayout(const ModelConfig& config, const PlanSizes& sizes,
              const std::vector<AttentionRows>& attention);

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
  static size_t max_bytes(const ModelConfig& config, const PlanSizes& sizes);
};

struct PlanShape {
  PlanShape(const ModelConfig& model, int32_t vocab_rows, const PlanSizes& plan_sizes,
            std::vector<AttentionRows> attention_rows);

  // Index into attention, inputs.tiles and inputs.num_tiles.
  size_t attention_index(const Step& step) const;

  const ModelConfig& config;  // the model's: lives as long as its weights
  const int32_t padded_vocab;
  const PlanSizes sizes;
  const std::vector<AttentionRows> attention;  // sorted
  const LaneLayout lane;
  const InputLayout inputs;
};

// Columns of the logits that a step of the head computes.
std::pair<int32_t, int32_t> head_column_range(int32_t padded_vocab, const Step& step);

// Whether the step is the last of the head, after which the tokens are chosen.
bool chooses_tokens(const ModelConfig& config, const Step& step);

// What the operators [step.first, step.last] do to the lane. last_rows: the rows of the batch that
// the final norm reads, if they are known to the plan (one size, one batch); else all may be read.
SegmentAccess access_of(const PlanShape& shape, const Step& step,
                        const std::vector<int32_t>& last_rows);

// The access of `first` and then `second`.
SegmentAccess joined(const SegmentAccess& first, const SegmentAccess& second);

}  // namespace flowprefill
