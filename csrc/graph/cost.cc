#include "graph/cost.h"

#include <algorithm>
#include <cmath>

namespace flowprefill {

OperatorWork& OperatorWork::operator+=(const OperatorWork& more) {
  product_flops += more.product_flops;
  weight_bytes += more.weight_bytes;
  attention_flops += more.attention_flops;
  cache_bytes += more.cache_bytes;
  other_s += more.other_s;
  return *this;
}

OperatorWork& OperatorWork::operator*=(double share) {
  product_flops *= share;
  weight_bytes *= share;
  attention_flops *= share;
  cache_bytes *= share;
  other_s *= share;
  return *this;
}

double MachineRates::seconds(const OperatorWork& work) const {
  return work.product_flops / gemm_flops_per_s + work.weight_bytes / weight_bytes_per_s +
         work.attention_flops / attention_flops_per_s + work.cache_bytes / cache_bytes_per_s +
         work.other_s;
}

Cost::Cost(const ModelGraph& graph, const Batch& batch, const MachineRates& rates, CostRules rules)
    : graph_(graph), batch_(batch), rates_(rates), rules_(rules) {
  keys_before_.reserve(batch.tokens.size() + 1);
  keys_before_.push_back(0);
  for (const Sequence& s : batch.sequences) {
    is_decode_ = is_decode_ && s.rows == 1;
    for (int32_t i = 0; i < s.rows; ++i)
      keys_before_.push_back(keys_before_.back() + s.context + i + 1);
  }
}

OperatorWork Cost::step_work(const Step& step) const {
  OperatorWork work;
  for (int32_t i = step.first; i <= step.last; ++i)
    work += work_of(graph_.op(i), step.row_begin, step.row_end);
  if (!step.is_whole()) {
    const int32_t parts = graph_.parts(graph_.op(step.first));
    work *= static_cast<double>(step.part_end - step.part_begin) / parts;
  }
  work.other_s += rates_.step_overhead_s;
  return work;
}

double Cost::range_s(int32_t first, int32_t last, int32_t begin, int32_t end) const {
  double total = 0;
  for (int32_t i = first; i <= last; ++i)
    total += operator_s(graph_.op(i), begin, end);
  return total;
}

double Cost::operator_s(const Operator& op, int32_t begin, int32_t end) const {
  return rates_.seconds(work_of(op, begin, end));
}

OperatorWork Cost::work_of(const Operator& op, int32_t begin, int32_t end) const {
  switch (op.kind) {
    case OperatorKind::kEmbed:
      return {.other_s = (end - begin) * rules_.embed_row_s};
    case OperatorKind::kLinear:
    case OperatorKind::kExperts:
      return product_work(op, end - begin);
    case OperatorKind::kAttention:
      return attention_work(op, begin, end);
    case OperatorKind::kScore:
    case OperatorKind::kPool:
      return {.other_s = static_cast<double>(end - begin) * graph_.tensor(op.input).columns *
                         rules_.kept_element_s};
    case OperatorKind::kRotary:
    case OperatorKind::kNorm:
    case OperatorKind::kRoute:
    case OperatorKind::kRope:
    case OperatorKind::kResidual:
    case OperatorKind::kRound:
    case OperatorKind::kSample:
      break;
  }
  return {};
}

// Of experts, each row multiplies by those that it has, and all rows read those that any has: as
// many as are expected if each row's were chosen by chance.
OperatorWork Cost::product_work(const Operator& op, int32_t rows) const {
  const Weight& w = graph_.weights.weight(op.weight);
  const double elements = static_cast<double>(w.rows()) * static_cast<double>(w.columns);
  const double all_bytes = w.stored_bytes > 0 ? static_cast<double>(w.stored_bytes)
                                              : elements * rules_.weight_element_bytes;
  const bool has_experts = op.kind == OperatorKind::kExperts;
  const double share = has_experts ? static_cast<double>(op.slots) / op.experts : 1.0;
  const double flops = 2.0 * elements * share * rows;
  const double bytes = all_bytes * (has_experts ? 1.0 - std::pow(1.0 - share, rows) : 1.0);
  if (bytes / rates_.weight_bytes_per_s > flops / rates_.gemm_flops_per_s)
    return {.weight_bytes = bytes};
  return {.product_flops = flops};
}

OperatorWork Cost::attention_work(const Operator& op, int32_t begin, int32_t end) const {
  end = std::min(end, batch_.rows());
  begin = std::min(begin, end);
  double pairs = static_cast<double>(keys_before_[static_cast<size_t>(end)] -
                                     keys_before_[static_cast<size_t>(begin)]);
  if (op.window > 0)
    pairs = std::min(pairs, static_cast<double>(op.window) * (end - begin));
  const double flops = pairs * 4.0 * graph_.attention.q_columns();
  // Rows of one sequence share what they read, so prefills are bound by what they compute.
  const double bytes =
      is_decode_ ? pairs * 2.0 * graph_.attention.kv_columns() * rules_.cache_element_bytes : 0.0;
  if (bytes / rates_.cache_bytes_per_s > flops / rates_.attention_flops_per_s)
    return {.cache_bytes = bytes};
  return {.attention_flops = flops};
}

}  // namespace flowprefill
