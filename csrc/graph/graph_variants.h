// Variants of a model graph that give more than logits, or something else: made from the graph
// alone, with the same weights by the same indices. Called by the devices' backends.
#pragma once

#include <cstdint>

#include "graph/model_graph.h"

namespace flowprefill {

// What a run gives.
enum class RunOutput : uint8_t {
  kLogits,  // of each sequence's last row
  kScores,  // the logits, and a PromptScore of every row
  kLast,    // each sequence's last row after the final norm: an embedding of the sequence
  kMean,    // the mean of its rows after the final norm
};

// The graph of an output. Throws std::invalid_argument: an embedding of a graph whose first
// operator after the layers is no norm of their last rows.
ModelGraph with_output(ModelGraph graph, RunOutput output);

// The graph with one more operator and tensor, which choose tokens from the logits: for devices
// that sample.
ModelGraph with_sampling(ModelGraph graph);

}  // namespace flowprefill
