// What runs can give, as both modules bind it: by name, and as views.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "graph/graph_variants.h"

namespace flowprefill {

// Throws std::invalid_argument naming what there is.
RunOutput output_of(const std::string& name);

// Binds has_logits(), logits(), sampled(), scores() and embeddings(), views that keep their run
// alive.
void bind_run_outputs(pybind11::module_& m);

}  // namespace flowprefill
