// Mixtures of experts in the graph layer: what is checked, how they are cut, what they cost.
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <stdexcept>
#include <string>

#include "graph/compiled_program.h"
#include "graph/cost.h"
#include "graph/layout.h"
#include "graph/planner.h"
#include "graph_fixture.h"

namespace flowprefill::testing {
namespace {

constexpr LlamaShape kShape{
    .hidden_size = 128, .intermediate_size = 96, .num_layers = 2, .experts = 16, .slots = 2};

int32_t index_of(const ModelGraph& graph, const std::string& name) {
  for (size_t i = 0; i < graph.operators.size(); ++i) {
    if (graph.operators[i].name == name)
      return static_cast<int32_t>(i);
  }
  return -1;
}

void expect_refused(const LlamaShape& shape, const std::string& part) {
  try {
    llama_graph(shape);
    ADD_FAILURE() << "not refused: " << part;
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(ExpertsTest, EachExpertIsWholeBlocksOfTheStackedMatrix) {
  const ModelGraph graph = llama_graph(kShape);
  EXPECT_EQ(graph.parts(graph.op(index_of(graph, "expert_gate_up"))), 16 * 3);
  EXPECT_EQ(graph.part_columns(graph.op(index_of(graph, "expert_gate_up"))), 32);
  EXPECT_EQ(graph.parts(graph.op(index_of(graph, "expert_down"))), 16 * 2);
  LlamaShape shape = kShape;
  shape.intermediate_size = 72;
  expect_refused(shape, "gated: columns of one expert: got 72, expected a multiple of 32");
  shape = kShape;
  shape.hidden_size = 96;
  expect_refused(shape, "hidden: columns of one expert: got 96, expected a multiple of 64");
  shape = kShape;
  shape.slots = 17;
  expect_refused(shape, "slots: got 17, expected 1..16");
}

TEST(ExpertsTest, ARowCostsItsExpertsAndReadsThoseThatAnyRowHas) {
  const ModelGraph graph = llama_graph(kShape);
  const Batch batch = batch_with({{512, 0}});
  const Operator& op = graph.op(index_of(graph, "expert_down"));
  const double elements = 16.0 * 128 * 96;
  const MachineRates fast_memory{.gemm_flops_per_s = 1, .weight_bytes_per_s = 1e30};
  const Cost by_products(graph, batch, fast_memory, {});
  EXPECT_DOUBLE_EQ(by_products.operator_s(op, 0, 512), 2 * 512 * elements / 8);
  const MachineRates slow_memory{.gemm_flops_per_s = 1e30, .weight_bytes_per_s = 1};
  const Cost by_weights(graph, batch, slow_memory, {});
  EXPECT_NEAR(by_weights.operator_s(op, 0, 1), 2 * elements / 8, 1);
  EXPECT_NEAR(by_weights.operator_s(op, 0, 4), 2 * elements * (1 - std::pow(0.875, 4)), 1);
  EXPECT_NEAR(by_weights.operator_s(op, 0, 512), 2 * elements, 1);
}

class ExpertsPlanTest : public ::testing::Test {
 protected:
  Plan plan(const MachineRates& rates, double budget_s) {
    return make_plan(graph_, batch_,
                     {.granularity = Granularity::kBudget, .budget_s = budget_s, .rates = rates},
                     cuts_);
  }

  const ModelGraph graph_ = llama_graph(kShape);
  const Batch batch_ = batch_with({{2000, 0}});
  const CutRules cuts_{.max_tile_rows = 128,
                       .min_tile_rows = 32,
                       .min_product_parts = 1,
                       .slices_products = true,
                       .expert_rows = 64,
                       .costs = {}};
};

TEST_F(ExpertsPlanTest, TilesGiveEachExpertRowsEnough) {
  EXPECT_EQ(plan({}, 1.0).tile_rows, 512);
}

TEST_F(ExpertsPlanTest, TilesShrinkWhereASliceOfAnOtherProductExceedsTheBudget) {
  EXPECT_EQ(plan({.gemm_flops_per_s = 1e8, .weight_bytes_per_s = 1e30}, 1e-3).tile_rows, 32);
}

// A slice may be a block of one expert, which few rows of the tile have.
TEST_F(ExpertsPlanTest, SlicesOfSomeExpertsFitTheBudgetWithTheLargestTile) {
  const double budget_s = 1e-3;
  const MachineRates rates{.gemm_flops_per_s = 2e10, .weight_bytes_per_s = 1e30};
  const Plan made = plan(rates, budget_s);
  EXPECT_EQ(made.tile_rows, 512);
  int32_t slices = 0;
  for (const Step& step : made.steps) {
    const bool has_experts = graph_.op(step.first).kind == OperatorKind::kExperts;
    slices += has_experts && !step.is_whole() ? 1 : 0;
    EXPECT_TRUE(!has_experts || step.predicted_s <= budget_s) << step.predicted_s;
  }
  EXPECT_GT(slices, 16);
}

TEST_F(ExpertsPlanTest, EveryPartOfEveryRowIsComputedOnce) {
  const Plan made = plan({.gemm_flops_per_s = 1e9, .weight_bytes_per_s = 1e9}, 1e-3);
  std::set<std::tuple<int32_t, int32_t, int32_t>> seen;
  int64_t wanted = 0;
  for (const Step& step : made.steps) {
    for (int32_t i = step.first; i <= step.last; ++i) {
      if (graph_.op(i).kind != OperatorKind::kExperts)
        continue;
      const int32_t end = step.is_whole() ? graph_.parts(graph_.op(i)) : step.part_end;
      for (int32_t row = step.row_begin; row < step.row_end; ++row) {
        for (int32_t part = step.part_begin; part < end; ++part)
          EXPECT_TRUE(seen.emplace(i, row, part).second);
      }
    }
  }
  for (const Operator& op : graph_.operators)
    wanted += op.kind == OperatorKind::kExperts ? int64_t{2000} * graph_.parts(op) : 0;
  EXPECT_EQ(static_cast<int64_t>(seen.size()), wanted);
}

// 512 experts of 128 blocks each, in slices of one: slices times parts fit no 32 bits.
TEST(ExpertsTest, SlicesOfVeryManyPartsAreInOrder) {
  const ModelGraph graph = llama_graph(
      {.hidden_size = 8192, .intermediate_size = 96, .num_layers = 1, .experts = 512, .slots = 2});
  const Batch batch = batch_with({{16, 0}});
  const CutRules cuts{.min_product_parts = 1, .slices_products = true, .costs = {}};
  const Plan made = make_plan(graph, batch,
                              {.granularity = Granularity::kBudget,
                               .budget_s = 1e-9,
                               .rates = {.gemm_flops_per_s = 1e6, .weight_bytes_per_s = 1e6}},
                              cuts);
  const int32_t down = index_of(graph, "expert_down");
  int32_t parts = 0;
  for (const Step& step : made.steps) {
    if (step.first != down)
      continue;
    ASSERT_EQ(step.part_begin, parts);
    ASSERT_EQ(step.part_end, ++parts);
  }
  EXPECT_EQ(parts, 65536);
}

TEST(ExpertsTest, WhatIsRoutedLivesUntilTheLastProductHasReadIt) {
  const auto graph = std::make_shared<const ModelGraph>(llama_graph(kShape));
  const Batch batch = batch_with({{8, 0}});
  const CompiledProgram program(
      graph, make_plan(*graph, batch, {.granularity = Granularity::kOperator, .rates = {}}, {}));
  const int32_t route = tensor_named(*graph, "route");
  for (size_t i = 0; i < program.size(); ++i) {
    const std::string op = program.label(i).op;
    const bool is_live = (program.live_tensors(i) >> route & 1) != 0;
    EXPECT_EQ(is_live, op == "expert_gate_up" || op == "expert_down") << op;
  }
}

TEST(ExpertsTest, StepsReadTheRowsOfTheirRoute) {
  const ModelGraph graph = llama_graph(kShape);
  const Layout layout(graph, {}, {.rows = 8, .tile_rows = 8, .sequences = 1});
  const int32_t down = index_of(graph, "expert_down");
  const Step step{.first = down, .last = down, .row_begin = 2, .row_end = 4};
  const LiveSet route({layout.rows(tensor_named(graph, "route"), 2, 4)});
  const SegmentAccess access = access_of(graph, layout, step, {});
  EXPECT_EQ(route.without(access.reads).bytes(), 0u);
}

}  // namespace
}  // namespace flowprefill::testing
