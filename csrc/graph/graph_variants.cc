#include "graph/graph_variants.h"

#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "graph/prompt_score.h"

namespace flowprefill {
namespace {

int32_t add_tensor(ModelGraph& graph, Tensor tensor) {
  graph.tensors.push_back(std::move(tensor));
  return static_cast<int32_t>(graph.tensors.size()) - 1;
}

// The final norm, which is to read all rows or the last ones and to write `output`.
Operator final_norm(const ModelGraph& graph, int32_t output) {
  const Operator& first = graph.op(graph.after_layers().begin);
  if (first.kind != OperatorKind::kNorm || !graph.is_gather(first)) {
    throw std::invalid_argument(std::string("operator ") + first.name +
                                ": is the first after the layers, expected a norm of their rows");
  }
  Operator norm = first;
  norm.output = output;
  return norm;
}

// Takes tensors out that no operator names.
void drop_unused_tensors(ModelGraph& graph) {
  std::vector<int32_t> place(graph.tensors.size(), -1);
  std::vector<Tensor> used;
  const auto keep = [&](int32_t& tensor) {
    if (tensor < 0)
      return;
    int32_t& index = place[static_cast<size_t>(tensor)];
    if (index < 0) {
      index = static_cast<int32_t>(used.size());
      used.push_back(graph.tensor(tensor));
    }
    tensor = index;
  };
  for (Operator& op : graph.operators) {
    keep(op.input);
    keep(op.output);
    keep(op.rotary);
    keep(op.route);
  }
  graph.tensors = std::move(used);
}

// What follows the layers once more, for all rows, tile by tile, instead of the last ones; then the
// operator that keeps of the logits what a PromptScore has.
ModelGraph with_scores(ModelGraph graph) {
  const auto [begin, end] = graph.after_layers();
  std::map<int32_t, int32_t> of_rows;  // tensor of the sequences -> that of all rows
  std::vector<Operator> over_rows;
  int32_t logits = -1;
  for (int32_t i = begin; i < end && logits < 0; ++i) {
    Operator op = graph.op(i);
    if (op.output == graph.logits())
      logits = i;
    if (of_rows.find(op.output) == of_rows.end()) {
      Tensor tensor = graph.output_of(op);
      tensor.name += "_of_rows";
      tensor.extent = Extent::kHeadTile;
      of_rows[op.output] = add_tensor(graph, std::move(tensor));
    }
    if (const auto found = of_rows.find(op.input); found != of_rows.end())
      op.input = found->second;
    op.output = of_rows[op.output];
    over_rows.push_back(op);
  }
  Operator score{.kind = OperatorKind::kScore, .name = "score", .input = over_rows.back().output};
  score.output = add_tensor(graph, {.name = "scores",
                                    .columns = PromptScore::kColumns,
                                    .type = ElementType::kFloat,
                                    .extent = Extent::kPrompt});
  over_rows.push_back(score);
  graph.operators.insert(graph.operators.begin() + begin, over_rows.begin(), over_rows.end());
  return graph;
}

ModelGraph with_embedding(ModelGraph graph, RunOutput output) {
  const int32_t columns = graph.output_of(graph.op(graph.after_layers().begin)).columns;
  const int32_t embedding = add_tensor(graph, {.name = "embedding",
                                               .columns = columns,
                                               .type = ElementType::kFloat,
                                               .extent = Extent::kSequence});
  Operator norm = final_norm(graph, embedding);
  graph.operators.resize(static_cast<size_t>(graph.after_layers().begin));
  if (output == RunOutput::kMean) {
    norm.output = add_tensor(graph, {.name = "normed_rows",
                                     .columns = columns,
                                     .type = ElementType::kFloat,
                                     .extent = Extent::kHeadTile});
    graph.operators.push_back(norm);
    graph.operators.push_back(
        {.kind = OperatorKind::kPool, .name = "pool", .input = norm.output, .output = embedding});
  } else {
    graph.operators.push_back(norm);
  }
  drop_unused_tensors(graph);
  return graph;
}

}  // namespace

ModelGraph with_output(ModelGraph graph, RunOutput output) {
  switch (output) {
    case RunOutput::kLogits:
      break;
    case RunOutput::kScores:
      return checked(with_scores(std::move(graph)));
    case RunOutput::kLast:
    case RunOutput::kMean:
      return checked(with_embedding(std::move(graph), output));
  }
  return graph;
}

ModelGraph with_sampling(ModelGraph graph) {
  const int32_t logits = graph.logits();
  const int32_t sampled = add_tensor(
      graph,
      {.name = "sampled", .columns = 1, .type = ElementType::kToken, .extent = Extent::kSequence});
  graph.operators.push_back(
      {.kind = OperatorKind::kSample, .name = "sample", .input = logits, .output = sampled});
  return checked(std::move(graph));
}

}  // namespace flowprefill
