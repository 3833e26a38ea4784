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

// Of the sequences alone, without padding: logits if wanted, then tokens.
std::vector<LiveRange> CudaModelProgram::fetched() const {
  const PlanShape& shape = *plan_->shape;
  const Operator& sample = shape.graph.operators.back();
  std::vector<LiveRange> ranges;
  if (fetches_logits_)
    ranges.push_back(shape.lane.rows(sample.input, 0, sequences_));
  ranges.push_back(shape.lane.rows(sample.output, 0, sequences_));
  return ranges;
}

const float* CudaModelProgram::logits() const {
  if (!fetches_logits_)
    return nullptr;
  return reinterpret_cast<const float*>(program_.result().data());
}

int64_t CudaModelProgram::logits_stride() const {
  return plan_->shape->lane.stride(plan_->shape->graph.logits());
}

std::span<const int32_t> CudaModelProgram::sampled() const {
  const auto count = static_cast<size_t>(sequences_);
  const std::byte* end = program_.result().data() + program_.result().size();
  return {reinterpret_cast<const int32_t*>(end) - count, count};
}

}  // namespace flowprefill
