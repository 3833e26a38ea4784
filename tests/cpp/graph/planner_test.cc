// How plans cut a batch: granularities, budgets, tiles, parts, merging, windows, chunks.
#include "graph/planner.h"

#include <gtest/gtest.h>

#include <set>

#include "graph/compiled_program.h"
#include "graph/graph_variants.h"
#include "graph_fixture.h"

namespace flowprefill::testing {
namespace {

constexpr int32_t kRows = 100;

class PlannerTest : public ::testing::Test {
 protected:
  PlannerTest() {
    options_.rates = {.gemm_flops_per_s = 1e12,
                      .attention_flops_per_s = 1e12,
                      .weight_bytes_per_s = 1e15,
                      .step_overhead_s = 1e-9};
    cuts_ = {.row_step = 4,
             .max_tile_rows = 32,
             .min_tile_rows = 8,
             .min_product_parts = 1,
             .attention_slices = AttentionSlices::kHeadsFirst,
             .embed_rows = 64,
             .costs = {.weight_element_bytes = 2, .embed_row_s = 1e-9}};
  }

  Plan plan(Granularity granularity, double budget_s = 0) {
    options_.granularity = granularity;
    options_.budget_s = budget_s;
    return make_plan(graph_, batch_, options_, cuts_);
  }
  std::string name(int32_t op) const { return graph_.op(op).name; }

  // Every operator computes every row and part once, and attention comes behind the keys it reads.
  void expect_complete(const Plan& plan) const {
    std::vector<std::set<std::pair<int32_t, int32_t>>> done(graph_.operators.size());
    for (const Step& step : plan.steps) {
      for (int32_t i = step.first; i <= step.last; ++i) {
        const int32_t end = step.is_whole() ? graph_.parts(graph_.op(i)) : step.part_end;
        ASSERT_LE(end, graph_.parts(graph_.op(i)));
        for (int32_t row = step.row_begin; row < step.row_end; ++row) {
          for (int32_t part = step.part_begin; part < end; ++part)
            ASSERT_TRUE(done[static_cast<size_t>(i)].emplace(row, part).second) << name(i);
          const bool is_first = i == 0 || graph_.is_per_sequence(graph_.op(i));
          ASSERT_TRUE(is_first || done[static_cast<size_t>(i) - 1].contains({row, 0})) << name(i);
        }
      }
    }
    for (size_t i = 0; i < done.size(); ++i) {
      const Operator& op = graph_.operators[i];
      const int32_t rows = graph_.is_per_sequence(op) ? batch_.num_sequences() : batch_.rows();
      EXPECT_EQ(done[i].size(), static_cast<size_t>(rows * graph_.parts(op))) << op.name;
    }
  }

  ModelGraph graph_ = llama_graph({.num_layers = 3, .windows = {16, 0, 0}});
  Batch batch_ = batch_with({{kRows - 30, 0}, {30, 12}});
  PlanOptions options_;
  CutRules cuts_;
};

TEST_F(PlannerTest, every_granularity_computes_everything_once_in_an_order_that_works) {
  options_.chunk_tokens = 21;
  for (const Granularity granularity :
       {Granularity::kNone, Granularity::kLayer, Granularity::kOperator, Granularity::kChunk}) {
    expect_complete(plan(granularity));
    if (HasFatalFailure())
      return;
  }
  for (const double budget_s : {1.0, 1e-5, 1e-6, 1e-7, 1e-8, 1e-12}) {
    expect_complete(plan(Granularity::kBudget, budget_s));
    if (HasFatalFailure())
      return;
  }
}

TEST_F(PlannerTest, segments_are_layers_operators_chunks_or_one) {
  EXPECT_EQ(plan(Granularity::kNone).size(), 1u);
  EXPECT_EQ(plan(Granularity::kLayer).size(), 3u + 2);
  options_.chunk_tokens = 30;
  EXPECT_EQ(plan(Granularity::kChunk).size(), 4u) << "100 rows by 30; the head is in the last";
  const Plan operators = plan(Granularity::kOperator);
  std::vector<std::string> first;
  for (size_t i = 0; i < operators.size(); ++i)
    first.push_back(name(operators.segment(i).front().first));
  EXPECT_EQ(std::vector(first.begin(), first.begin() + 6),
            (std::vector<std::string>{"embed", "attn_norm", "attention", "o_proj", "mlp_norm",
                                      "down_proj"}));
  EXPECT_EQ(first.back(), "final_norm");
  EXPECT_EQ(first.size(), 1u + 3 * 5 + 1);
}

TEST_F(PlannerTest, tiles_of_rows_go_through_a_layer_one_after_another) {
  const Plan p = plan(Granularity::kLayer);
  EXPECT_EQ(p.tile_rows, 32);
  const auto layer = p.segment(1);
  ASSERT_EQ(layer.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(layer[i].row_begin, static_cast<int32_t>(32 * i));
    EXPECT_EQ(layer[i].base, layer[i].row_begin);
    EXPECT_EQ(layer[i].first, graph_.layer(0).begin);
    EXPECT_EQ(layer[i].last, graph_.layer(0).end - 1);
  }
  EXPECT_EQ(layer[3].row_end, kRows);
  EXPECT_EQ(plan(Granularity::kOperator).tile_rows, kRows) << "operators are cut for all rows";
}

TEST_F(PlannerTest, budget_bounds_every_segment_that_can_be_cut_further) {
  const double budget_s = 2e-6;
  const Plan p = plan(Granularity::kBudget, budget_s);
  const std::vector<double> seconds = predict_segments(graph_, batch_, options_, cuts_, p);
  ASSERT_EQ(seconds.size(), p.size());
  size_t num_over = 0;
  for (size_t i = 0; i < p.size(); ++i) {
    if (seconds[i] <= budget_s)
      continue;
    ++num_over;
    ASSERT_EQ(p.segment(i).size(), 1u) << "merged beyond the budget";
    const Step& step = p.segment(i).front();
    EXPECT_TRUE(step.row_end - step.row_begin <= cuts_.min_tile_rows || step.first == 0)
        << name(step.first);
  }
  EXPECT_LT(num_over, p.size() / 4);
}

TEST_F(PlannerTest, neighbours_are_merged_while_they_fit_together) {
  const double budget_s = 1e-5;
  const Plan p = plan(Granularity::kBudget, budget_s);
  const std::vector<double> seconds = predict_segments(graph_, batch_, options_, cuts_, p);
  for (size_t i = 0; i + 1 < p.size(); ++i)
    EXPECT_GT(seconds[i] + seconds[i + 1], budget_s) << "segments " << i << " and " << i + 1;
  EXPECT_EQ(plan(Granularity::kBudget, 1).size(), 1u);
}

TEST_F(PlannerTest, attention_is_cut_by_heads_where_the_device_wants_it_else_by_rows_alone) {
  const auto heads_of = [&](const Plan& p) {
    std::set<std::pair<int32_t, int32_t>> parts;
    for (const Step& step : p.steps) {
      if (graph_.op(step.first).kind == OperatorKind::kAttention)
        parts.emplace(step.part_begin, step.part_end);
    }
    return parts;
  };
  // Rows of a tile at the end see some 60 keys: half of their attention fits.
  const double budget_s = 4 * 70 * 4.0 * 256 / 1e12 / 2 * 1.1;
  using Parts = std::set<std::pair<int32_t, int32_t>>;
  const Parts cut = heads_of(plan(Granularity::kBudget, budget_s));
  EXPECT_TRUE(cut.contains({0, 1}) && cut.contains({1, 2}));
  cuts_.attention_slices = AttentionSlices::kRows;
  EXPECT_EQ(heads_of(plan(Granularity::kBudget, budget_s)), (Parts{{0, 0}}));
}

TEST_F(PlannerTest, products_of_a_tile_are_cut_by_parts_where_the_device_wants_it) {
  cuts_.slices_products = true;
  double dearest_s = 0;  // of a part of a product for the most rows that a tile may have
  for (const Step& step : plan(Granularity::kOperator).steps) {
    for (int32_t i = step.first; i <= step.last; ++i) {
      const Operator& op = graph_.op(i);
      if (op.kind == OperatorKind::kLinear && i < graph_.after_layers().begin)
        dearest_s = std::max(dearest_s, step.predicted_s / step.rows() / graph_.parts(op));
    }
  }
  dearest_s *= cuts_.max_tile_rows;
  for (const auto& [share, tile_rows] : {std::pair{1.01, 32}, {0.6, 16}, {0.3, 8}, {0.01, 8}}) {
    const double budget_s = dearest_s * share;
    const Plan p = plan(Granularity::kBudget, budget_s);
    EXPECT_EQ(p.tile_rows, tile_rows) << "rows only where a part does not fit";
    expect_complete(p);
    bool is_any_sliced = false;
    for (const Step& step : p.steps) {
      const Operator& op = graph_.op(step.first);
      if (op.kind != OperatorKind::kLinear || step.first != step.last)
        continue;
      is_any_sliced = is_any_sliced || !step.is_whole();
      EXPECT_TRUE(step.predicted_s <= budget_s || share == 0.01) << op.name;
    }
    EXPECT_TRUE(is_any_sliced);
  }
}

// Gate and up have 14 parts, five tiles of three parts: two multiprocessors take three turns at
// them, and four at halves of three tiles each.
TEST_F(PlannerTest, slices_of_products_leave_few_multiprocessors_without_a_tile) {
  graph_ = llama_graph({.intermediate_size = 448, .num_layers = 3});
  cuts_.slices_products = true;
  cuts_.product_tile_rows = cuts_.max_tile_rows;
  cuts_.product_tile_columns.fill(192);
  const double part_s = 2.0 * 64 * 64 * cuts_.max_tile_rows / 1e12;
  const auto ends = [&] {
    std::vector<int32_t> found;
    for (const Step& step : plan(Granularity::kBudget, 10.5 * part_s).steps) {
      if (name(step.first) == "gate_up_proj" && step.base == 0 && graph_.op(step.first).layer == 0)
        found.push_back(step.part_end);
    }
    return found;
  };
  EXPECT_EQ(ends(), (std::vector{7, 14}));
  cuts_.multiprocessors = 2;
  EXPECT_EQ(ends(), (std::vector{6, 14})) << "the shorter slice first";
  for (const double share : {20.0, 10.5, 5.5, 2.5, 1.5, 0.1}) {
    expect_complete(plan(Granularity::kBudget, share * part_s));
    if (HasFatalFailure())
      return;
  }
}

TEST_F(PlannerTest, slices_of_attention_are_whole_row_steps) {
  for (const Step& step : plan(Granularity::kBudget, 1e-9).steps) {
    if (graph_.op(step.first).kind != OperatorKind::kAttention)
      continue;
    EXPECT_EQ((step.row_begin - step.base) % cuts_.row_step, 0);
    EXPECT_GE(step.base, 0);
  }
}

TEST_F(PlannerTest, slices_of_attention_have_the_queries_that_fill_the_device) {
  for (const int32_t least : {16, 40, 64, 1000}) {
    cuts_.min_attention_queries = least;
    for (const double budget_s : {1e-9, 4 * 70 * 4.0 * 256 / 1e12 / 2 * 1.1}) {
      const Plan p = plan(Granularity::kBudget, budget_s);
      for (const Step& step : p.steps) {
        if (graph_.op(step.first).kind != OperatorKind::kAttention)
          continue;
        const int32_t kv_heads = step.is_whole() ? 2 : step.part_end - step.part_begin;
        const int32_t rest = 4 * std::min(p.tile_rows - step.row_begin + step.base,
                                          kRows - step.row_begin);  // of the tile
        EXPECT_GE(4 / 2 * kv_heads * step.rows(), std::min(least, rest)) << least;
      }
    }
  }
}

// Each of these sequences has a tile of its own for each KV head.
TEST_F(PlannerTest, decode_rows_fill_the_device_by_their_tiles) {
  batch_ = batch_with({{1, 500}, {1, 500}, {1, 500}, {1, 500}});
  cuts_.min_attention_queries = 64;
  const auto is_cut = [this](int32_t tile) {
    cuts_.attention_tile = tile;
    return std::ranges::any_of(plan(Granularity::kBudget, 1e-9).steps, [this](const Step& step) {
      return graph_.op(step.first).kind == OperatorKind::kAttention && !step.is_whole();
    });
  };
  for (const auto first : {AttentionSlices::kHeadsFirst, AttentionSlices::kRowsFirst}) {
    cuts_.attention_slices = first;
    EXPECT_TRUE(is_cut(16)) << "4 tiles of 16 for a KV head";
    EXPECT_FALSE(is_cut(8));
  }
}

TEST_F(PlannerTest, head_is_cut_into_no_fewer_parts_than_the_device_wants) {
  for (const int32_t least : {1, 2, 3}) {
    cuts_.min_product_parts = least;
    std::vector<std::pair<int32_t, int32_t>> parts;
    for (const Step& step : plan(Granularity::kBudget, 1e-12).steps) {
      if (name(step.first) == "lm_head")
        parts.emplace_back(step.part_begin, step.part_end);
    }
    std::vector<std::pair<int32_t, int32_t>> want;
    for (int32_t part = 0; part < 4; part += least)  // 203 columns by 64
      want.emplace_back(part, std::min(part + least, 4));
    EXPECT_EQ(parts, want);
  }
}

TEST_F(PlannerTest, labels_tell_operator_layers_rows_and_seconds) {
  auto graph = std::make_shared<const ModelGraph>(graph_);
  const CompiledProgram layers(graph, plan(Granularity::kLayer));
  const SegmentLabel second = layers.label(2);
  EXPECT_EQ(second.op, std::string("attn_norm"));
  EXPECT_EQ(second.layer, 1);
  EXPECT_EQ(second.last_layer, 1);
  EXPECT_EQ(second.row_begin, 0);
  EXPECT_EQ(second.row_end, kRows);
  EXPECT_DOUBLE_EQ(second.predicted_s,
                   predict_segments(graph_, batch_, options_, cuts_, layers.plan())[2]);
  const SegmentLabel head = layers.label(4);
  EXPECT_EQ(head.op, std::string("final_norm"));
  EXPECT_EQ(head.layer, -1);
  EXPECT_EQ(head.row_end, 2) << "sequences";
  EXPECT_TRUE(layers.is_per_sequence(4));
  EXPECT_FALSE(layers.is_per_sequence(3));
  const SegmentLabel all = CompiledProgram(graph, plan(Granularity::kNone)).label(0);
  EXPECT_EQ(all.op, std::string("embed"));
  EXPECT_EQ(all.layer, -1);
  EXPECT_EQ(all.last_layer, -1);
  EXPECT_EQ(all.row_end, kRows) << "rows of the prompt, not of the sequences behind them";
}

// Layer 0 sees 16 keys a row, the others all.
TEST_F(PlannerTest, attention_with_a_window_costs_its_keys_alone) {
  const Plan p = plan(Granularity::kOperator);
  const auto seconds_of = [&](int32_t layer) {
    for (const Step& step : p.steps) {
      const Operator& op = graph_.op(step.first);
      if (op.kind == OperatorKind::kAttention && op.layer == layer)
        return step.predicted_s - options_.rates.step_overhead_s;
    }
    return 0.0;
  };
  const double per_key_s = 4.0 * 256 / 1e12;
  EXPECT_NEAR(seconds_of(0), kRows * 16 * per_key_s, 1e-12);
  const double keys = 70 * 71 / 2 + (12 * 30 + 30 * 31 / 2);
  EXPECT_NEAR(seconds_of(1), keys * per_key_s, 1e-12);
}

// 4 heads of 64 read 2 of keys and values: 1,024 operations or 512 bytes for a key.
TEST_F(PlannerTest, rows_of_decode_steps_cost_reading_the_cache_where_that_takes_longer) {
  cuts_.costs.cache_element_bytes = 2;
  options_.rates.cache_bytes_per_s = 1e11;
  const auto attention_of = [&](const Batch& batch) {
    OperatorWork work;
    for (const Step& step : make_plan(graph_, batch, options_, cuts_).steps)
      work += step.work;
    return std::pair(work.attention_flops, work.cache_bytes);
  };
  options_.granularity = Granularity::kOperator;
  const double keys = 2 * (53 + 31) + 2 * 16;  // of three layers; the first sees 16 a row
  const auto [decode_flops, read_bytes] = attention_of(batch_with({{1, 52}, {1, 30}}));
  EXPECT_EQ(decode_flops, 0);
  EXPECT_EQ(read_bytes, keys * 512);
  const auto [prefill_flops, prefill_bytes] = attention_of(batch_with({{2, 52}, {1, 30}}));
  EXPECT_GT(prefill_flops, 0);
  EXPECT_EQ(prefill_bytes, 0);
  options_.rates.cache_bytes_per_s = 1e15;
  EXPECT_EQ(attention_of(batch_with({{1, 52}, {1, 30}})).second, 0);
}

TEST_F(PlannerTest, predictions_for_another_batch_are_its_own) {
  options_.rates.attention_flops_per_s = 1e9;
  const Plan p = plan(Granularity::kLayer);
  const Batch with_context = batch_with({{kRows - 30, 0}, {30, 52}});
  const std::vector<double> here = predict_segments(graph_, batch_, options_, cuts_, p);
  const std::vector<double> there = predict_segments(graph_, with_context, options_, cuts_, p);
  EXPECT_NEAR(there[2] - here[2], 30 * 40 * 4.0 * 256 / 1e9, 1e-9);
  const Batch shorter = batch_with({{10, 0}});
  EXPECT_LT(predict_segments(graph_, shorter, options_, cuts_, p)[2], here[2]);
}

TEST_F(PlannerTest, every_granularity_computes_what_other_outputs_need) {
  const ModelGraph plain = graph_;
  options_.chunk_tokens = 21;
  for (const RunOutput output : {RunOutput::kScores, RunOutput::kLast, RunOutput::kMean}) {
    graph_ = with_output(plain, output);
    for (const Granularity granularity :
         {Granularity::kNone, Granularity::kLayer, Granularity::kOperator, Granularity::kChunk}) {
      expect_complete(plan(granularity));
      if (HasFatalFailure())
        return;
    }
    for (const double budget_s : {1.0, 1e-5, 1e-7, 1e-12}) {
      expect_complete(plan(Granularity::kBudget, budget_s));
      if (HasFatalFailure())
        return;
    }
  }
}

TEST_F(PlannerTest, scoring_is_cut_to_the_budget) {
  graph_ = with_output(std::move(graph_), RunOutput::kScores);
  cuts_.min_product_parts = 1;
  cuts_.costs.kept_element_s = 1e-9;
  const double budget_s = 203 * 1e-9 * 4;  // four rows of logits
  options_.rates.step_overhead_s = 0;
  const Plan p = plan(Granularity::kBudget, budget_s);
  for (const Step& step : p.steps) {
    if (name(step.first) == "score" && step.first == step.last) {
      EXPECT_LE(step.rows(), 4);
      EXPECT_GE(step.rows(), 1);
    }
  }
  EXPECT_EQ(p.head_tile_rows, std::min(cuts_.head_tile_rows, kRows));
}

TEST_F(PlannerTest, sampling_comes_last_and_rides_with_the_head) {
  const size_t num_segments = plan(Granularity::kOperator).size();
  graph_ = with_sampling(std::move(graph_));
  const Plan p = plan(Granularity::kOperator);
  EXPECT_EQ(p.size(), num_segments);
  EXPECT_EQ(name(p.steps.back().last), "sample");
  EXPECT_EQ(name(p.segment(p.size() - 1).front().first), "final_norm");
  const Plan fine = plan(Granularity::kBudget, 1e-12);
  EXPECT_EQ(name(fine.steps.back().first), "sample");
}

}  // namespace
}  // namespace flowprefill::testing
