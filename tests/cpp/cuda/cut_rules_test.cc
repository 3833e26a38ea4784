// The plans of a GPU for an 8B model, by rates that others published for an H100: lengths of
// segments and what the cuts cost. Predictions of the planner; nothing here has been measured.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <utility>

#include "../graph_fixture.h"
#include "devices/cuda/backend/cuda_backend_options.h"
#include "graph/key_chunks.h"

namespace flowprefill::testing {
namespace {

// Operator times of Llama-3.1-8B at 8,192 tokens, ms a layer: qkv 0.54, attention 0.91, o 0.35,
// gate_up 2.64, down 1.29, element-wise 0.56 (which rides in the rate of the products). The same
// kernels run however they are cut into segments: what a cut costs is a launch and an event.
constexpr MachineRates kH100{.gemm_flops_per_s = 3.573e12 / 5.38e-3,
                             .attention_flops_per_s = 0.55e12 / 0.91e-3,
                             .weight_bytes_per_s = 3e12,
                             .step_overhead_s = 0};
constexpr double kSegmentOverhead = 2.5e-6;
constexpr double kBudget = 0.5e-3;

class CutRulesTest : public ::testing::TestWithParam<int32_t> {
 protected:
  CutRulesTest() : options_{.budget_s = kBudget, .rates = kH100} {}

  Plan plan(Granularity granularity) {
    options_.granularity = granularity;
    return make_plan(graph_, batch_, options_, kCudaCuts);
  }
  std::vector<double> seconds_of(const Plan& plan) const {
    std::vector<double> seconds = predict_segments(graph_, batch_, options_, kCudaCuts, plan);
    for (double& segment : seconds)
      segment += kSegmentOverhead;
    return seconds;
  }

  // Of a step's first row, and of all its rows.
  int32_t chunks_of(const Step& step) const {
    const bool is_attention = graph_.op(step.first).kind == OperatorKind::kAttention;
    return is_attention ? KeyChunks::of(32, 132).count_at(step.row_begin) : 1;
  }

  const ModelGraph graph_ = llama_graph({.vocab_size = 128256,
                                         .hidden_size = 4096,
                                         .intermediate_size = 14336,
                                         .num_layers = 32,
                                         .num_heads = 32,
                                         .num_kv_heads = 8,
                                         .head_dim = 128});
  const Batch batch_ = batch_with({{GetParam(), 0}});
  PlanOptions options_;
};

double total(const std::vector<double>& seconds) {
  return std::accumulate(seconds.begin(), seconds.end(), 0.0);
}

TEST_P(CutRulesTest, no_segment_is_long_and_cutting_costs_little) {
  const std::vector<double> cut = seconds_of(plan(Granularity::kBudget));
  EXPECT_LE(*std::ranges::max_element(cut), 0.6e-3);
  const double whole_s = total(seconds_of(plan(Granularity::kNone)));
  EXPECT_LT(total(cut), 1.01 * whole_s);
  EXPECT_GT(total(cut), whole_s) << "a cut costs something";
}

TEST_P(CutRulesTest, tiles_are_of_512_to_2048_rows_and_slices_of_whole_tiles_of_the_kernels) {
  const Plan p = plan(Granularity::kBudget);
  EXPECT_GE(p.tile_rows, 512);
  EXPECT_LE(p.tile_rows, 2048);
  for (const Step& step : p.steps) {
    const bool is_cut = graph_.op(step.first).layer >= 0 && step.row_end < batch_.rows();
    const bool has_chunks = chunks_of(step) > 1;
    const int32_t row_step = has_chunks ? kCudaCuts.chunk_row_step : kCudaCuts.row_step;
    EXPECT_TRUE(!is_cut || step.rows() % row_step == 0) << step.rows();
  }
}

// Turns that 132 multiprocessors take at tiles of 128 rows and so many columns of a product.
int64_t waves_of(int64_t rows, int64_t columns, int64_t tile_columns) {
  const int64_t tiles = (rows + 127) / 128 * ((columns + tile_columns - 1) / tile_columns);
  return (tiles + 131) / 132;
}

TEST_P(CutRulesTest, slices_of_products_take_no_more_turns_than_the_whole) {
  for (const double budget_s : {0.3e-3, 0.5e-3}) {
    options_.budget_s = budget_s;
    for (const int64_t tile_columns : {128, 192, 256, 320}) {
      std::map<std::pair<int32_t, int32_t>, std::pair<int64_t, int64_t>> waves;  // cut, whole
      for (const Step& step : plan(Granularity::kBudget).steps) {
        const Operator& op = graph_.op(step.first);
        if (op.kind != OperatorKind::kLinear || step.is_whole() || op.layer < 0)
          continue;
        auto& [cut, whole] = waves[{step.first, step.row_begin}];
        cut += waves_of(step.rows(), int64_t{step.part_end - step.part_begin} * kPartColumns,
                        tile_columns);
        whole = waves_of(step.rows(), int64_t{graph_.parts(op)} * kPartColumns, tile_columns);
      }
      EXPECT_FALSE(waves.empty());
      for (const auto& [of, counts] : waves)
        ASSERT_LE(counts.first, counts.second) << budget_s << " s, " << tile_columns;
    }
  }
}

// Tiles of 128 rows of a head: 512 of 2,048 rows. A turn of tiles of one chunk takes its share.
TEST_P(CutRulesTest, slices_of_attention_take_no_more_turns_than_the_whole) {
  for (const double budget_s : {0.3e-3, 0.5e-3, 1e-3}) {
    options_.budget_s = budget_s;
    std::map<std::pair<int32_t, int32_t>, double> turns;
    for (const Step& step : plan(Granularity::kBudget).steps) {
      if (graph_.op(step.first).kind != OperatorKind::kAttention)
        continue;
      const int32_t chunks = chunks_of(step);
      turns[{step.first, step.base}] +=
          static_cast<double>(waves_of(step.rows(), 32 * chunks, 1)) / chunks;
    }
    for (const auto& [of, count] : turns)
      ASSERT_LE(count, static_cast<double>(waves_of(2048, 32, 1)))
          << budget_s << " s, from row " << of.second;
  }
}

TEST_P(CutRulesTest, long_contexts_are_cut_by_rows_into_slices_that_fill_the_device) {
  int64_t fewest = int64_t{1} << 40;
  bool is_cut = false;
  for (const Step& step : plan(Granularity::kBudget).steps) {
    if (graph_.op(step.first).kind != OperatorKind::kAttention)
      continue;
    EXPECT_TRUE(step.is_whole()) << "all KV heads";
    is_cut |= step.rows() < 2048;
    fewest = std::min(fewest, int64_t{step.rows()} * 8 * 4 * chunks_of(step));
  }
  EXPECT_EQ(is_cut, GetParam() > 8192);
  EXPECT_GE(fewest, kCudaCuts.min_attention_queries);
}

// A run that begins anywhere: slices end where the chunks of their rows do.
TEST(LongContexts, slices_have_rows_of_the_same_chunks) {
  const ModelGraph graph = llama_graph({.num_heads = 32, .num_kv_heads = 8, .head_dim = 128});
  const KeyChunks chunks = KeyChunks::of(32, 132);
  const Batch batch = batch_with({{700, 100}, {3000, 100100}, {2500, 31000}, {900, 150000}});
  const PlanOptions options{.budget_s = kBudget, .rates = kH100};
  std::set<int32_t> contexts;
  bool is_cut_by_heads = false;
  for (const Step& step : make_plan(graph, batch, options, kCudaCuts).steps) {
    if (graph.op(step.first).kind != OperatorKind::kAttention)
      continue;
    const auto s =
        std::ranges::upper_bound(batch.sequences, step.row_begin, {}, &Sequence::row_end);
    const int32_t position = s->context + step.row_begin - s->row_begin;
    if (chunks.keys_at(position) == 0)
      continue;
    EXPECT_LE(step.row_end, s->row_end());
    EXPECT_LE(position + step.rows(), chunks.end_at(position));
    EXPECT_LE(step.predicted_s, 1.2 * kBudget);
    EXPECT_TRUE(step.is_whole() || position >= 131072);
    is_cut_by_heads |= !step.is_whole();
    contexts.insert(s->context);
  }
  EXPECT_EQ(contexts.size(), 3u);
  EXPECT_TRUE(is_cut_by_heads) << "beyond 128k tokens a tile of all heads takes too long";
}

// Devices whose kernel takes no chunks, and windows.
TEST(LongContexts, without_chunks_slices_are_as_large_as_ever) {
  CutRules cuts = kCudaCuts;
  const Batch batch = batch_with({{2048, 100000}});
  const PlanOptions options{.budget_s = kBudget, .rates = kH100};
  for (const int32_t window : {0, 65536}) {
    const ModelGraph graph = llama_graph({.num_layers = 1,
                                          .num_heads = 32,
                                          .num_kv_heads = 8,
                                          .head_dim = 128,
                                          .windows = {window}});
    cuts.chunks_keys = window > 0;
    for (const Step& step : make_plan(graph, batch, options, cuts).steps) {
      if (graph.op(step.first).kind != OperatorKind::kAttention)
        continue;
      EXPECT_EQ(step.rows(), 512);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Tokens, CutRulesTest, ::testing::Values(2048, 8192, 32768, 131072));

}  // namespace
}  // namespace flowprefill::testing
