// Graphs that plans of one bucket share, and those that they must not.
#include <gtest/gtest.h>

#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

class ModelGraphsTest : public ModelTest {
 protected:
  void SetUp() override {
    ModelTest::SetUp();
    options_.buckets = {8, 16};
  }

  Part prompt(int32_t rows) const { return {0, {}, tiny_.random_tokens(rows, 1)}; }

  const TinyModel tiny_{Kind::kLlama, 2};
};

TEST_F(ModelGraphsTest, buckets_share_graphs_between_budgets_that_cut_alike) {
  make_model(tiny_);
  start();
  plan_options_.budget_s = 1;
  for (uint32_t id = 1; id <= 3; ++id)
    execute(id, {prompt(8)});
  const uint64_t num_captured = model_->graph_report().num_captured;
  EXPECT_EQ(num_captured, 1u);
  plan_options_.budget_s = 2;
  execute(4, {prompt(8)});
  EXPECT_EQ(model_->graph_report().num_captured, num_captured);
  EXPECT_EQ(model_->graph_report().num_replayed, 3u);
}

// Segments that begin and end with the same operators may differ in the parts of the head alone:
// these budgets cut everything else alike.
TEST_F(ModelGraphsTest, graphs_of_plans_that_cut_the_head_elsewhere_are_not_mixed_up) {
  make_model(tiny_);
  start();
  plan_options_.rates.weight_bytes_per_s = 1e11;
  const double part_s = 203.0 / 4 * 64 * 2 / 1e11;
  std::vector<size_t> num_segments;
  uint32_t id = 0;
  for (const double budget_s : {1.95 * part_s, 2.05 * part_s}) {
    plan_options_.budget_s = budget_s;
    for (int i = 0; i < 3; ++i) {
      const std::vector<int32_t> tokens = tiny_.random_tokens(8, ++id);
      expect_close(execute(id, {{0, {}, tokens}})[0], tiny_.logits(tokens),
                   "run " + std::to_string(id));
      EXPECT_EQ(programs_.at(id)->bucket(), 8);
    }
    num_segments.push_back(programs_.at(id)->size());
  }
  EXPECT_EQ(num_segments[0], num_segments[1] + 2) << "four parts of the head one by one, or by two";
  EXPECT_GT(model_->graph_report().num_replayed, 0u);
}

// A budget's first segment may begin and end where a chunk does: it has embedded all rows.
TEST_F(ModelGraphsTest, graphs_of_chunks_are_not_taken_for_those_of_tiles) {
  constexpr int32_t kRows = 16;
  constexpr int32_t kContext = 1008;  // near what plans of buckets assume
  options_.cuts.max_tile_rows = plan_options_.chunk_tokens = kRows / 2;
  options_.max_context = kContext + kRows;
  const TinyModel tiny(Kind::kLlama, 1);
  make_model(tiny);
  start();
  plan_options_.rates.gemm_flops_per_s = 1e11;
  plan_options_.rates.attention_flops_per_s = 1e12;
  plan_options_.budget_s = 19.5e-6;  // a tile through the layer, and no part of another
  Batch batch;
  batch.tokens = tiny.random_tokens(kRows, 1);
  batch.sequences.push_back({.rows = kRows, .context = kContext, .block_table = {}});
  batch.sequences[0].block_table.resize((kContext + kRows) / kBlockTokens);
  for (int32_t i = 0; i < kRows / kBlockTokens; ++i)
    batch.sequences[0].block_table.rbegin()[i] = i + 1;
  std::vector<Logits> all;
  for (const Granularity granularity : {Granularity::kChunk, Granularity::kBudget}) {
    plan_options_.granularity = granularity;
    for (int i = 0; i < 3; ++i) {
      const auto id = static_cast<uint32_t>(all.size()) + 1;
      add(id, program_of(batch));
      execute_to_end(id);
      EXPECT_EQ(programs_.at(id)->bucket(), kRows);
      EXPECT_EQ(programs_.at(id)->size(), 2u);
      all.push_back(logits(id));
      EXPECT_EQ(all.back(), all.front()) << "run " << id;
    }
  }
  EXPECT_EQ(model_->graph_report().num_replayed, 2u * 2 * 2);
}

}  // namespace
}  // namespace flowprefill::testing
