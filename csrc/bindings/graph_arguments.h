// graph_from(): reads a model graph from Python (flowprefill/models/graph.py) by its fields' names.
// Called when a model is made, by the bindings of both devices.
#pragma once

#include "bindings/module.h"
#include "graph/model_graph.h"

namespace flowprefill {

// Throws std::invalid_argument naming the field, what was given and what is allowed. The GIL is
// held.
ModelGraph graph_from(const pybind11::handle& graph);

}  // namespace flowprefill
