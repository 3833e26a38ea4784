#include "devices/cuda/backend/cuda_model_program.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace flowprefill {

CudaModelProgram::CudaModelProgram(std::shared_ptr<const void> owner,
                                   std::shared_ptr<CudaResources> resources, PlannedBatch planned,
                                   const Batch& batch, std::vector<std::byte> inputs,
                                   const ProgramOptions& options)
    : owner_(std::move(owner)),
      plan_(std::move(planned.plan)),
      predicted_s_(std::move(planned.predicted_s)),
      rows_(batch.rows()),
      sequences_(batch.num_sequences()),
      fetches_logits_(options.fetch_logits),
      fail_at_(options.fail_at),
      results_(results()),
      program_(std::move(resources), plan_->plan, rows_, std::move(inputs), fetched()) {}

SegmentLabel CudaModelProgram::label(size_t i) const {
  SegmentLabel label = program_.label(i);
  label.predicted_s = predicted_s_[i];
  const int32_t rows = plan_->compiled.is_per_sequence(i) ? sequences_ : rows_;
  label.row_begin = std::min(label.row_begin, rows);
  label.row_end = std::min(label.row_end, rows);
  return label;
}

void CudaModelProgram::execute(size_t i, const ExecutionContext& context) {
  if (static_cast<int64_t>(i) == fail_at_)
    throw std::runtime_error(std::string("injected failure in ") + program_.label(i).op);
  program_.execute(i, context);
}

// Without padding: the rows of the batch or of its sequences.
CudaModelProgram::Results CudaModelProgram::results() const {
  const ModelGraph& graph = plan_->shape->graph;
  Results results;
  size_t offset = 0;
  const auto fetch = [&](int32_t tensor, int32_t rows) {
    const LiveRange range = plan_->shape->lane.rows(tensor, 0, rows);
    offset += range.bytes;
    return Fetched{.tensor = tensor, .range = range, .offset = offset - range.bytes};
  };
  if (graph.logits() < 0)
    results.embedding = fetch(graph.operators.back().output, sequences_);
  else if (fetches_logits_)
    results.logits = fetch(graph.logits(), sequences_);
  for (const Operator& op : graph.operators) {
    if (op.kind == OperatorKind::kScore)
      results.scores = fetch(op.output, rows_);
    if (op.kind == OperatorKind::kSample)
      results.sampled = fetch(op.output, sequences_);
  }
  return results;
}

std::vector<LiveRange> CudaModelProgram::fetched() const {
  std::vector<LiveRange> ranges;
  for (const Fetched* one :
       {&results_.logits, &results_.scores, &results_.embedding, &results_.sampled}) {
    if (one->tensor >= 0)
      ranges.push_back(one->range);
  }
  return ranges;
}

const float* CudaModelProgram::logits() const {
  return results_.logits.tensor < 0 ? nullptr : at<float>(results_.logits).data();
}

int64_t CudaModelProgram::logits_stride() const {
  const int32_t logits = plan_->shape->graph.logits();
  return logits < 0 ? 0 : plan_->shape->lane.stride(logits);
}

std::span<const int32_t> CudaModelProgram::sampled() const {
  return at<int32_t>(results_.sampled);
}

std::span<const PromptScore> CudaModelProgram::scores() const {
  return at<PromptScore>(results_.scores);
}

std::span<const float> CudaModelProgram::embeddings() const {
  return at<float>(results_.embedding);
}

}  // namespace flowprefill
