#include "devices/cuda/backend/operator_fusion.h"

#include <algorithm>
#include <array>

namespace flowprefill {
namespace {

// Whether operator `index` is the only one that reads what the one before it has made.
bool is_only_reader(const ModelGraph& graph, int32_t index) {
  const int32_t tensor = graph.op(index - 1).output;
  if (graph.op(index).input != tensor)
    return false;
  for (size_t i = static_cast<size_t>(index) + 1; i < graph.operators.size(); ++i) {
    const Operator& op = graph.operators[i];
    const std::array<int32_t, 4> read = tensors_read(op);
    if (std::ranges::find(read, tensor) != read.end())
      return false;
    if (op.output == tensor)
      return true;  // written anew
  }
  return true;
}

}  // namespace

std::optional<OperatorFusion> operators_to_fuse(const ModelGraph& graph, const Step& step,
                                                int32_t index) {
  OperatorFusion found;
  const auto follows = [&](int32_t next, OperatorKind kind) {
    return next <= step.last && graph.op(next).kind == kind && is_only_reader(graph, next);
  };
  // Whether the kernel would write elsewhere than where other blocks of it may still read.
  const auto is_apart = [&](int32_t last) {
    return graph.op(last).output != graph.op(index).input;
  };
  if (!step.is_whole())
    return std::nullopt;  // other slices read what the norm makes, too
  found.product = index;
  if (graph.op(index).kind == OperatorKind::kNorm && !graph.is_gather(graph.op(index)) &&
      follows(index + 1, OperatorKind::kLinear) && is_apart(index + 1)) {
    found.norm = index;
    found.product = index + 1;
  }
  if (graph.op(found.product).kind != OperatorKind::kLinear)
    return std::nullopt;
  if (follows(found.product + 1, OperatorKind::kRope) && is_apart(found.product + 1))
    found.rope = found.product + 1;
  if (found.norm < 0 && found.rope < 0)
    return std::nullopt;
  return found;
}

int32_t last_of_kernel(const ModelGraph& graph, int32_t index) {
  const Step all{.last = static_cast<int32_t>(graph.operators.size()) - 1};
  const auto found = operators_to_fuse(graph, all, index);
  return found.has_value() ? std::max(found->product, found->rope) : index;
}

}  // namespace flowprefill
