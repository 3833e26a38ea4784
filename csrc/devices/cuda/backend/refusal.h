// What of a model graph CUDA has no kernel for. Called by CudaBackend before it takes memory.
#pragma once

#include <string>

#include "graph/model_graph.h"

namespace flowprefill {

// Why CUDA does not take an operator of the graph; empty: it does.
std::string refusal_of(const ModelGraph& graph, const Operator& op);

// Throws std::invalid_argument "operator NAME of layer N: " and why, for the first that is refused.
void check_operators(const ModelGraph& graph);

}  // namespace flowprefill
