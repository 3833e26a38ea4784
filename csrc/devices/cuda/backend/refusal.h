// What of a model graph CUDA has no kernel for. Called by CudaBackend before it takes memory.
#pragma once

#include <string>

#include "graph/model_graph.h"

namespace flowprefill {

// Why CUDA does not take an operator of the graph; empty: it does.
std::string refusal_of(const ModelGraph& graph, const Operator& op);

}  // namespace flowprefill
