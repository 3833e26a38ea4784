// operators_to_fuse(): which operators of a step one kernel may compute. Asked by OperatorKernels,
// which knows whether there is a kernel that takes them, and by lane_rules().
#pragma once

#include <optional>

#include "graph/cost.h"
#include "graph/model_graph.h"

namespace flowprefill {

// A product and its neighbours, by their index in the graph; -1: there is none.
struct OperatorFusion {
  int32_t norm = -1;
  int32_t product = -1;
  int32_t rope = -1;
};

// From operator `index` of the step on: a norm with the product of its rows, a product with the
// rope of its columns, or all three. What lies between them is not written then, so nothing else
// reads it. Empty: no such operators follow one another there.
std::optional<OperatorFusion> operators_to_fuse(const ModelGraph& graph, const Step& step,
                                                int32_t index);

// The last operator that may be in one kernel with this one, wherever a plan cuts: see
// LayoutRules.
int32_t last_of_kernel(const ModelGraph& graph, int32_t index);

}  // namespace flowprefill
