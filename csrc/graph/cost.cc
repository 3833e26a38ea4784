#include "graph/cost.h"

#include <algorithm>

namespace flowprefill {

Cost::Cost(const ModelGraph& graph, const Batch& batch, const MachineRates& rates, CostRules rules)
    : graph_(graph), batch_(batch), rates_(rates), rules_(rules) {
  keys_before_.reserve(batch.tokens.size() + 1);
  keys_before_.push_back(0);
  for (const Sequence& s : batch.sequences) {
    for (int32_t i = 0; i < s.rows; ++i)
      keys_before_.push_back(keys_before_.back() + s.context + i + 1);
  }
}

double Cost::step_s(const Step& step) const {
  double seconds = range_s(step.first, step.last, step.row_begin, step.row_end);
  if (!step.is_whole()) {
    const int32_t parts = graph_.parts(graph_.op(step.first));
    seconds *= static_cast<double>(step.part_end - step.part_begin) / parts;
  }
  return rates_.step_overhead_s + seconds;
}

double Cost::range_s(int32_t first, int32_t last, int32_t begin, int32_t end) const {
  double total = 0;
  for (int32_t i = first; i <= last; ++i)
    total += operator_s(graph_.op(i), begin, end);
  return total;
}

double Cost::operator_s(const Operator& op, int32_t begin, int32_t end) const {
  switch (op.kind) {
    case OperatorKind::kEmbed:
      return (end - begin) * rules_.embed_row_s;
    case OperatorKind::kLinear:
      return linear_s(op, end - begin);
    case OperatorKind::kAttention:
      return attention_s(op, begin, end);
    case OperatorKind::kScore:
    case OperatorKind::kPool:
      return static_cast<double>(end - begin) * graph_.tensor(op.input).columns *
             rules_.kept_element_s;
    case OperatorKind::kRotary:
    case OperatorKind::kNorm:
    case OperatorKind::kRope:
    case OperatorKind::kResidual:
    case OperatorKind::kRound:
    case OperatorKind::kSample:
      break;
  }
  return 0.0;
}

double Cost::linear_s(const Operator& op, int32_t rows) const {
  const Weight& w = graph_.weights.weight(op.weight);
  const double elements = static_cast<double>(w.rows()) * static_cast<double>(w.columns);
  const double bytes = w.stored_bytes > 0 ? static_cast<double>(w.stored_bytes)
                                          : elements * rules_.weight_element_bytes;
  return std::max(2.0 * elements * rows / rates_.gemm_flops_per_s,
                  bytes / rates_.weight_bytes_per_s);
}

double Cost::attention_s(const Operator& op, int32_t begin, int32_t end) const {
  end = std::min(end, batch_.rows());
  begin = std::min(begin, end);
  double pairs = static_cast<double>(keys_before_[static_cast<size_t>(end)] -
                                     keys_before_[static_cast<size_t>(begin)]);
  if (op.window > 0)
    pairs = std::min(pairs, static_cast<double>(op.window) * (end - begin));
  return pairs * 4.0 * graph_.attention.q_columns() / rates_.attention_flops_per_s;
}

}  // namespace flowprefill
