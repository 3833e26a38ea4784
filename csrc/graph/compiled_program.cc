#include "graph/compiled_program.h"

#include <algorithm>

namespace flowprefill {
namespace {

constexpr uint64_t bit(int32_t tensor) {
  return tensor < 0 ? 0 : uint64_t{1} << tensor;
}

uint64_t reads_of(const Operator& op) {
  uint64_t tensors = 0;
  for (const int32_t tensor : tensors_read(op))
    tensors |= bit(tensor);
  return tensors;
}

// Whether the step writes the first of what its tensor will hold: what was there before is dead,
// since steps fill a tensor in ascending order before anything reads it.
bool begins_anew(const ModelGraph& graph, const Operator& op, const Step& step) {
  const Extent extent = graph.output_of(op).extent;
  const bool is_of_tile = extent == Extent::kTile || extent == Extent::kHeadTile;
  const int32_t first = is_of_tile ? step.base : 0;
  return step.row_begin == first && step.part_begin == 0;
}

// They hold nothing before the layers are through.
uint64_t sequence_tensors(const ModelGraph& graph) {
  uint64_t tensors = 0;
  for (size_t i = 0; i < graph.tensors.size(); ++i) {
    if (graph.tensors[i].extent == Extent::kSequence)
      tensors |= bit(static_cast<int32_t>(i));
  }
  return tensors;
}

}  // namespace

CompiledProgram::CompiledProgram(std::shared_ptr<const ModelGraph> graph, Plan plan)
    : graph_(std::move(graph)), plan_(std::move(plan)) {
  uint64_t missing = graph_->results();
  for (size_t s = 0; s < plan_.steps.size() && missing != 0; ++s) {
    const Step& step = plan_.steps[s];
    for (int32_t i = std::max(step.first, graph_->rows_after_layers().begin); i <= step.last; ++i) {
      const int32_t output = graph_->op(i).output;
      if ((missing & bit(output)) == 0)
        continue;
      result_starts_.push_back({output, s});
      missing &= ~bit(output);
    }
  }
}

uint64_t CompiledProgram::live_results(size_t cursor) const {
  uint64_t live = 0;
  for (const ResultStart& start : result_starts_)
    live |= start.step < plan_.segments[cursor] ? bit(start.tensor) : 0;
  return live;
}

bool CompiledProgram::is_per_sequence(size_t segment) const {
  return graph_->is_per_sequence(graph_->op(steps(segment).front().first));
}

SegmentLabel CompiledProgram::label(size_t segment) const {
  const std::span<const Step> own = steps(segment);
  const Step& first = own.front();
  SegmentLabel label{.op = graph_->op(first.first).name, .row_begin = first.row_begin};
  label.layer = graph_->op(first.first).layer;
  label.last_layer = graph_->op(own.back().last).layer;
  for (const Step& step : own) {
    label.predicted_s += step.predicted_s;
    if (graph_->is_per_sequence(graph_->op(step.first)) && !is_per_sequence(segment))
      continue;  // its rows are sequences, those before it rows of the prompt
    label.row_begin = std::min(label.row_begin, step.row_begin);
    label.row_end = std::max(label.row_end, step.row_end);
  }
  return label;
}

OperatorWork CompiledProgram::work(size_t segment) const {
  OperatorWork work;
  for (const Step& step : steps(segment))
    work += step.work;
  return work;
}

uint64_t CompiledProgram::live_tensors(size_t cursor) const {
  if (cursor == 0)
    return 0;
  if (cursor == size())
    return graph_->results();
  const size_t num_tensors = graph_->tensors.size();
  const uint64_t all = num_tensors == 64 ? ~uint64_t{0} : (uint64_t{1} << num_tensors) - 1;
  uint64_t live = live_results(cursor);
  uint64_t settled = graph_->results() | (is_per_sequence(cursor) ? 0 : sequence_tensors(*graph_));
  for (size_t s = plan_.segments[cursor]; s < plan_.steps.size() && settled != all; ++s) {
    const Step& step = plan_.steps[s];
    for (int32_t i = step.first; i <= step.last; ++i) {
      const Operator& op = graph_->op(i);
      const uint64_t reads = reads_of(op) & ~settled;
      live |= reads;
      settled |= reads;
      if (begins_anew(*graph_, op, step))
        settled |= bit(op.output);
    }
  }
  return live;
}

}  // namespace flowprefill
