// The planner: cuts a batch's work into steps and groups steps into segments, by predicted time.
// Called by the devices' backends when they make a program.
//
// Inside a layer everything but attention is row-wise, and attention of rows [a, b) reads keys of
// rows < b only. So tiles of rows go through a whole layer one after another, each while its
// activations are in cache. All granularities are orders and groupings of the same operators.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "graph/batch.h"
#include "graph/cost.h"
#include "graph/model_graph.h"

namespace flowprefill {

enum class Granularity : uint8_t { kNone, kLayer, kOperator, kChunk, kBudget };

// What a run is to be cut by.
struct PlanOptions {
  Granularity granularity = Granularity::kBudget;
  double budget_s = 2e-3;      // kBudget: longest wanted segment
  int32_t chunk_tokens = 512;  // kChunk
  MachineRates rates;
};

// What attention is cut by: rows alone, KV heads before rows as few rows at once are slow, or rows
// before KV heads.
enum class AttentionSlices : uint8_t { kRows, kHeadsFirst, kRowsFirst };

// Where a device wants its cuts; all counts are for the whole device, not for one of its threads.
struct CutRules {
  int32_t row_step = 16;           // rows of a slice of attention are a multiple of it
  int32_t max_tile_rows = 128;     // rows that go through a layer together
  int32_t min_tile_rows = 32;      // fewer are inefficient (below 97 % of the rate)
  int32_t min_product_parts = 16;  // parts in a slice of a product
  // A kernel of products gives each multiprocessor a tile of so many rows and of one of these
  // numbers of columns at once: slices of a product end where few are left without one, whichever
  // kernel it is. 0: not known; slices are equal.
  int32_t multiprocessors = 0;
  int32_t product_tile_rows = 128;
  std::array<int32_t, 4> product_tile_columns = {128, 192, 256, 320};
  AttentionSlices attention_slices = AttentionSlices::kHeadsFirst;
  bool slices_products = false;  // products of a tile by parts before it gets fewer rows
  // (row, query head) pairs of a slice of attention: fewer would leave a part of the device idle.
  // Each sequence's count as whole tiles of those that share a KV head.
  int32_t min_attention_queries = 1;
  int32_t attention_tile = 1;
  // Whether the device's attention splits the keys of rows far back (KeyChunks): then slices of as
  // many pairs for all chunks together do, of a multiple of chunk_row_step rows.
  bool chunks_keys = false;
  int32_t chunk_row_step = 1;
  // Rows of a tile that each expert of a mixture has, if they are chosen evenly: so many make
  // reading its weights worth it. Tiles may have more rows than max_tile_rows for them.
  int32_t expert_rows = 128;
  int32_t embed_rows = 512;     // rows of a step before the layers
  int32_t head_tile_rows = 64;  // rows that go through what follows the layers together
  CostRules costs;
};

struct Plan {
  std::vector<Step> steps;
  std::vector<uint32_t> segments;  // index of the first step of each segment
  int32_t tile_rows = 0;           // rows the tile tensors must hold
  int32_t chunk_rows = 0;          // rows that go through all layers before others do
  int32_t head_tile_rows = 0;      // the same for those behind the layers; 0: there are none

  size_t size() const { return segments.size(); }
  std::span<const Step> segment(size_t i) const {
    const size_t end = i + 1 < segments.size() ? segments[i + 1] : steps.size();
    return std::span(steps).subspan(segments[i], end - segments[i]);
  }
};

// The batch has been checked.
Plan make_plan(const ModelGraph& graph, const Batch& batch, const PlanOptions& options,
               const CutRules& cuts);

// Predicted seconds of each segment of a plan on another batch, which has at most the rows that the
// plan was made for.
std::vector<double> predict_segments(const ModelGraph& graph, const Batch& batch,
                                     const PlanOptions& options, const CutRules& cuts,
                                     const Plan& plan);

}  // namespace flowprefill
