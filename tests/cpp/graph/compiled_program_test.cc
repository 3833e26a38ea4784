// Which tensors live at a boundary, against an execution of the plan element by element.
#include "graph/compiled_program.h"

#include <gtest/gtest.h>

#include <map>

#include "graph/graph_variants.h"
#include "graph_fixture.h"

namespace flowprefill::testing {
namespace {

// What a plan does to the elements of its tensors: (tensor, row, part of the columns).
class Simulation {
 public:
  explicit Simulation(const CompiledProgram& program, const Batch& batch)
      : program_(program),
        graph_(program.graph()),
        last_rows_(last_rows(batch)),
        sequences_(sequence_of_rows(batch)) {}

  // [size + 1] by boundary: tensors of which something that is there is read later.
  std::vector<uint64_t> live() {
    std::vector<uint64_t> live(program_.size() + 1);
    for (size_t s = 0; s < program_.size(); ++s) {
      for (const Step& step : program_.steps(s)) {
        for (int32_t i = step.first; i <= step.last; ++i)
          execute(graph_.op(i), step, s, live);
      }
    }
    for (const auto& [element, segment] : written_) {  // the result is read in the end
      const uint64_t tensor = uint64_t{1} << std::get<0>(element);
      for (size_t i = segment + 1; i < live.size() && (graph_.results() & tensor) != 0; ++i)
        live[i] |= tensor;
    }
    return live;
  }

 private:
  using Element = std::tuple<int32_t, int32_t, int32_t>;

  int32_t row_in(int32_t tensor, const Step& step, int32_t row) const {
    const Extent extent = graph_.tensor(tensor).extent;
    if (extent == Extent::kSequence && step.first < graph_.after_layers().begin)
      return sequences_[static_cast<size_t>(row)];
    const bool is_of_tile = extent == Extent::kTile || extent == Extent::kHeadTile;
    return is_of_tile ? row - step.base : row;
  }

  // Elements lie in the tensor from the segment that wrote them on to all that read them.
  void read(int32_t tensor, int32_t row, size_t segment, std::vector<uint64_t>& live) {
    for (auto it = written_.lower_bound({tensor, row, 0});
         it != written_.end() && std::get<0>(it->first) == tensor && std::get<1>(it->first) == row;
         ++it) {
      for (size_t boundary = it->second + 1; boundary <= segment; ++boundary)
        live[boundary] |= uint64_t{1} << tensor;
    }
  }

  void execute(const Operator& op, const Step& step, size_t segment, std::vector<uint64_t>& live) {
    const int32_t end = step.is_whole() ? graph_.parts(op) : step.part_end;
    for (int32_t row = step.row_begin; row < step.row_end; ++row) {
      if (op.input >= 0) {
        const bool is_gather =
            graph_.is_per_sequence(op) && graph_.tensor(op.input).extent == Extent::kPrompt;
        read(op.input,
             is_gather ? last_rows_[static_cast<size_t>(row)] : row_in(op.input, step, row),
             segment, live);
      }
      if (op.rotary >= 0)
        read(op.rotary, row_in(op.rotary, step, row), segment, live);
      if (reads_output(op))
        read(op.output, row_in(op.output, step, row), segment, live);
      for (int32_t part = step.part_begin; part < end; ++part)
        written_[{op.output, row_in(op.output, step, row), part}] = segment;
    }
  }

  const CompiledProgram& program_;
  const ModelGraph& graph_;
  const std::vector<int32_t> last_rows_;
  const std::vector<int32_t> sequences_;  // by row
  std::map<Element, size_t> written_;     // by which segment
};

class CompiledProgramTest : public ::testing::TestWithParam<RunOutput> {};

TEST_P(CompiledProgramTest, live_tensors_are_those_that_an_execution_reads_later) {
  const auto graph =
      std::make_shared<const ModelGraph>(with_output(llama_graph({.num_layers = 2}), GetParam()));
  const Batch batch = batch_with({{40, 0}, {9, 5}, {1, 30}});
  const CutRules cuts{.row_step = 4,
                      .max_tile_rows = 16,
                      .min_tile_rows = 8,
                      .min_product_parts = 1,
                      .attention_slices = AttentionSlices::kHeadsFirst,
                      .embed_rows = 20,
                      .head_tile_rows = 7,
                      .costs = {}};
  PlanOptions options;
  options.chunk_tokens = 17;
  options.rates.step_overhead_s = 0;
  for (const Granularity granularity :
       {Granularity::kNone, Granularity::kLayer, Granularity::kOperator, Granularity::kChunk,
        Granularity::kBudget, Granularity::kBudget, Granularity::kBudget}) {
    options.granularity = granularity;
    options.budget_s = options.budget_s > 1e-3 ? 1e-5 : options.budget_s / 1000;
    const CompiledProgram program(graph, make_plan(*graph, batch, options, cuts));
    const std::vector<uint64_t> want = Simulation(program, batch).live();
    EXPECT_EQ(program.live_tensors(0), 0u);
    EXPECT_EQ(program.live_tensors(program.size()), graph->results());
    EXPECT_EQ(want.back(), graph->results());
    for (size_t i = 1; i < program.size(); ++i) {
      // Between chunks all of the prompt's tensors count.
      const uint64_t extra = granularity == Granularity::kChunk ? 3 : 0;
      EXPECT_EQ(program.live_tensors(i), want[i] | extra)
          << "granularity " << static_cast<int>(granularity) << ", boundary " << i << " of "
          << program.size() << ", before " << program.label(i).op;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Outputs, CompiledProgramTest,
                         ::testing::Values(RunOutput::kLogits, RunOutput::kScores, RunOutput::kLast,
                                           RunOutput::kMean));

}  // namespace
}  // namespace flowprefill::testing
