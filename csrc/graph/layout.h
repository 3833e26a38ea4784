// Layout: where a run's activations lie in one range of bytes, and which of these bytes an operator
// reads and writes. Made by backends that keep activations in one piece (CUDA's lanes).
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "graph/cost.h"
#include "graph/live_set.h"
#include "graph/model_graph.h"

namespace flowprefill {

// Whether a tensor holds the rows of a tile, from the step's base on.
constexpr bool is_of_tile(Extent extent) {
  return extent == Extent::kTile || extent == Extent::kHeadTile;
}

// Whether it holds logits: of the sequences' last rows, or of rows that are scored.
bool holds_logits(const ModelGraph& graph, int32_t tensor);

// Rows that the tensors hold.
struct PlanSizes {
  int32_t rows = 0;            // of the batch, padding included
  int32_t tile_rows = 0;       // of the tile that goes through a layer together
  int32_t sequences = 0;       // padding included
  int32_t head_tile_rows = 0;  // of the tile behind the layers
  auto operator<=>(const PlanSizes&) const = default;
};

struct LayoutRules {
  ElementBytes elements;
  size_t alignment = 256;     // bytes, of every tensor's start
  int32_t logits_stride = 0;  // elements between rows of logits; 0: the vocabulary
  // The last of the operators that one kernel may compute together with this one: some of its
  // blocks read until others have written. Null: each operator has a kernel of its own.
  int32_t (*last_of_kernel)(const ModelGraph& graph, int32_t index) = nullptr;
};

// Tensors of the tile that are never alive together lie on one another, so a device must execute a
// layer's operators one after another for all rows of a step, but for those that the rules let it
// take together. The tensors of the result lie side by side: it is one range.
class Layout {
 public:
  Layout(const ModelGraph& graph, const LayoutRules& rules, const PlanSizes& sizes);

  const PlanSizes& sizes() const { return sizes_; }
  size_t bytes() const { return bytes_; }
  size_t offset(int32_t tensor) const { return places_[static_cast<size_t>(tensor)].offset; }
  // Elements between rows.
  int32_t stride(int32_t tensor) const { return places_[static_cast<size_t>(tensor)].stride; }
  // Rows [begin, end) of a tensor.
  LiveRange rows(int32_t tensor, int32_t begin, int32_t end) const;
  LiveRange all(int32_t tensor) const;
  LiveRange result() const { return result_; }

 private:
  struct Place {
    size_t offset = 0;
    size_t element_bytes = 0;
    int32_t stride = 0;
    int32_t rows = 0;

    size_t row_bytes() const { return static_cast<size_t>(stride) * element_bytes; }
    size_t bytes() const { return row_bytes() * static_cast<size_t>(rows); }
  };

  void place_tile_tensors(const ModelGraph& graph, const LayoutRules& rules);
  void place_result(const ModelGraph& graph);

  const PlanSizes sizes_;
  std::vector<Place> places_;
  LiveRange result_;
  size_t bytes_ = 0;
};

// What a step's operators do to the bytes. last_rows: the rows of the batch that sequences end
// with, if the plan is for one batch; empty: any row may be one.
SegmentAccess access_of(const ModelGraph& graph, const Layout& layout, const Step& step,
                        const std::vector<int32_t>& last_rows);

// The access of `first` and then `second`.
SegmentAccess joined(const SegmentAccess& first, const SegmentAccess& second);

}  // namespace flowprefill
