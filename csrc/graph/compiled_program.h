// CompiledProgram: the plan of a batch on a model graph, with what every device tells of it:
// labels, steps of a segment, live tensors at a boundary. Part of the programs that backends make.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "graph/model_graph.h"
#include "graph/planner.h"
#include "runtime/segment.h"

namespace flowprefill {

// Thread: any; constant after construction.
class CompiledProgram {
 public:
  CompiledProgram(std::shared_ptr<const ModelGraph> graph, Plan plan);

  const ModelGraph& graph() const { return *graph_; }
  const Plan& plan() const { return plan_; }
  size_t size() const { return plan_.size(); }
  std::span<const Step> steps(size_t segment) const { return plan_.segment(segment); }

  // The first operator, the layers and the rows of a segment, and its predicted time.
  SegmentLabel label(size_t segment) const;
  // What the segment was planned to do.
  OperatorWork work(size_t segment) const;
  // Whether the segment begins behind the layers, so that its label's rows are sequences.
  bool is_per_sequence(size_t segment) const;

  // Tensors (bit i: tensor i of the graph) of which something is read after the boundary before
  // segment `cursor` that was written before it, and what is there of the result; between chunks
  // the prompt's tensors too, since any of their rows may be a sequence's last. Cost: a look at
  // each step up to the end of the next tile.
  uint64_t live_tensors(size_t cursor) const;

 private:
  // Results of which something was written before segment `cursor`.
  uint64_t live_results(size_t cursor) const;

  // A tensor of the result, and the first step that writes it.
  struct ResultStart {
    int32_t tensor = 0;
    size_t step = 0;
  };

  std::shared_ptr<const ModelGraph> graph_;
  Plan plan_;
  std::vector<ResultStart> result_starts_;
};

}  // namespace flowprefill
