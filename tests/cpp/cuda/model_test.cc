// Whole real programs: what CudaBackend computes, compared with a plain transformer, by batches,
// buckets, granularities, graphs.
#include <gtest/gtest.h>

#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

class ModelKinds : public ModelTest, public ::testing::WithParamInterface<Kind> {};

// The kernels' own bodies in place of the plain loops: a prompt in two parts and a decode step.
TEST_P(ModelKinds, bodies_of_the_kernels_follow_the_plain_transformer) {
  if (!fake_kernels::has_bodies())
    GTEST_SKIP() << "fibres and sanitizers do not go together";
  const TinyModel tiny(GetParam(), 2);
  make_model(tiny);
  start();
  fake_kernels::use_bodies(true);
  const std::vector<int32_t> a = tiny.random_tokens(20, 1);
  const std::vector<int32_t> b = tiny.random_tokens(20, 2);
  execute(1, {{0, {}, first(a, 3)}});
  const auto got = execute(2, {{0, first(a, 3), between(a, 3, 19)}, {1, {}, first(b, 5)}});
  expect_close(got[0], tiny.logits(first(a, 19)), "continued");
  expect_close(got[1], tiny.logits(first(b, 5)), "new");
  EXPECT_EQ(programs_.at(2)->sampled()[1], std::ranges::max_element(got[1]) - got[1].begin());
  const auto decoded = execute(3, {{0, first(a, 19), between(a, 19, 20)}});
  expect_close(decoded[0], tiny.logits(a), "decoded");
}

std::string name_of(const ::testing::TestParamInfo<Kind>& kind) {
  const char* names[] = {"Llama", "Qwen", "Window", "Tied"};
  return names[static_cast<size_t>(kind.param)];
}

INSTANTIATE_TEST_SUITE_P(Kinds, ModelKinds,
                         ::testing::Values(Kind::kLlama, Kind::kQwen, Kind::kWindow, Kind::kTied),
                         name_of);

// ---- buckets, graphs, granularities: the same bits whatever the way

class ModelWays : public ModelTest {
 protected:
  static std::vector<Part> parts(const TinyModel& tiny) {
    return {{0, {}, tiny.random_tokens(13, 1)}, {1, {}, tiny.random_tokens(8, 2)}};
  }
};

TEST_F(ModelWays, every_granularity_gives_the_same_bits) {
  const TinyModel tiny(Kind::kWindow, 3);
  options_.cuts.max_tile_rows = 8;
  options_.cuts.min_tile_rows = 4;
  make_model(tiny);
  start();
  std::vector<Logits> got;
  std::vector<size_t> num_segments;
  for (const Granularity granularity :
       {Granularity::kNone, Granularity::kLayer, Granularity::kOperator, Granularity::kChunk,
        Granularity::kBudget, Granularity::kBudget}) {
    plan_options_.granularity = granularity;
    plan_options_.chunk_tokens = 5;
    plan_options_.budget_s = got.size() == 4 ? 1e-3 : 1e-12;
    const auto id = static_cast<uint32_t>(got.size() + 1);
    got.push_back(execute(id, parts(tiny)));
    num_segments.push_back(programs_.at(id)->size());
    EXPECT_EQ(got.back(), got.front()) << "granularity " << static_cast<int>(granularity);
  }
  EXPECT_EQ(num_segments[0], 1u);
  EXPECT_EQ(num_segments[1], 2 + 3u);
  EXPECT_EQ(num_segments[4], 1u) << "all fits a large budget";
  EXPECT_GT(num_segments[5], num_segments[2]) << "a small budget cuts finer than operators";
  EXPECT_EQ(programs_.at(6)->label(num_segments[5] - 2).op, std::string("lm_head"));
}

TEST_F(ModelWays, padded_to_a_bucket_eager_captured_and_replayed_gives_the_bits_of_the_exact_size) {
  const TinyModel tiny(Kind::kQwen, 2);
  plan_options_.granularity = Granularity::kOperator;
  options_.has_graphs = false;
  make_model(tiny);
  start();
  const Logits exact = execute(1, parts(tiny));
  EXPECT_EQ(programs_.at(1)->bucket(), 0);
  tear_down();
  options_.has_graphs = true;
  for (const int32_t bucket : {21, 22, 33, 42}) {
    options_.buckets = {bucket};
    make_model(tiny);
    start();
    for (uint32_t id = 1; id <= 4; ++id) {
      EXPECT_EQ(execute(id, parts(tiny)), exact) << "bucket " << bucket << ", run " << id;
      EXPECT_EQ(programs_.at(id)->bucket(), bucket);
    }
    const GraphReport report = model_->graph_report();
    const auto size = programs_.at(1)->size();
    EXPECT_EQ(report.num_captured, size);
    EXPECT_EQ(report.num_replayed, 3 * size) << "the first run is eager";
    EXPECT_EQ(report.num_failed, 0u) << report.last_failure;
    tear_down();
  }
}

// What a graph holds must be of no run: other tokens, lengths, blocks, sequences.
TEST_F(ModelWays, graphs_captured_for_one_batch_serve_others) {
  const TinyModel tiny(Kind::kWindow, 3);
  options_.buckets = {24};
  make_model(tiny);
  start();
  for (uint32_t id = 1; id <= 3; ++id)
    execute(id, parts(tiny));
  const uint64_t num_captured = model_->graph_report().num_captured;
  EXPECT_GT(num_captured, 0u);
  const std::vector<int32_t> tokens = tiny.random_tokens(40, 9);
  const auto a = execute(4, {{3, {}, first(tokens, 11)}, {5, {}, first(tokens, 2)}});
  const auto b = execute(5, {{5, first(tokens, 2), between(tokens, 2, 9)},
                             {4, {}, first(tokens, 1)},
                             {3, first(tokens, 11), between(tokens, 11, 20)}});
  expect_close(a[0], tiny.logits(first(tokens, 11)), "run 4, sequence 3");
  expect_close(a[1], tiny.logits(first(tokens, 2)), "run 4, sequence 5");
  expect_close(b[0], tiny.logits(first(tokens, 9)), "run 5, sequence 5");
  expect_close(b[1], tiny.logits(first(tokens, 1)), "run 5, sequence 4");
  expect_close(b[2], tiny.logits(first(tokens, 20)), "run 5, sequence 3");
  EXPECT_EQ(programs_.at(5)->bucket(), 24);
  EXPECT_EQ(model_->graph_report().num_captured, num_captured);
}

TEST_F(ModelWays, warming_captures_small_buckets_before_the_first_run_and_changes_no_result) {
  const TinyModel tiny(Kind::kQwen, 2);
  options_.buckets = {4, 24, 64};
  options_.warm_tokens = 24;
  make_model(tiny);
  start(plan_options_);
  const GraphReport warmed = model_->graph_report();
  EXPECT_GT(warmed.num_captured, 0u);
  EXPECT_EQ(warmed.num_failed, 0u) << warmed.last_failure;
  const auto got = execute(1, parts(tiny));
  expect_close(got[0], tiny.logits(tiny.random_tokens(13, 1)), "sequence 0");
  EXPECT_EQ(programs_.at(1)->bucket(), 24);
  EXPECT_EQ(model_->graph_report().num_captured, warmed.num_captured);
  EXPECT_GT(model_->graph_report().num_replayed, warmed.num_replayed);
}

TEST_F(ModelWays, graphs_beyond_the_memory_for_them_are_left_out) {
  const TinyModel tiny(Kind::kLlama, 2);
  options_.buckets = {24};
  options_.graph_bytes = 3 * fake_cudart::kBytesPerNode;
  plan_options_.granularity = Granularity::kOperator;
  make_model(tiny);
  start();
  const Logits once = execute(1, parts(tiny));
  for (uint32_t id = 2; id <= 4; ++id)
    EXPECT_EQ(execute(id, parts(tiny)), once);
  const GraphReport report = model_->graph_report();
  EXPECT_LE(report.bytes, options_.graph_bytes);
  EXPECT_GT(report.num_executables, 0u);
  EXPECT_GT(report.num_no_room, 0u);
}

TEST_F(ModelWays, measuring_the_products_changes_no_result) {
  const TinyModel tiny(Kind::kQwen, 1);
  options_.max_tokens = 4;  // few rows to measure
  options_.max_sequences = 1;
  const std::vector<Part> part = {{0, {}, tiny.random_tokens(4, 1)}};
  make_model(tiny);
  start();
  const Logits guessed = execute(1, part);
  EXPECT_TRUE(model_->gemm_report().empty());
  tear_down();
  options_.measures_gemms = true;
  make_model(tiny);
  start();
  const std::vector<GemmReport> reports = model_->gemm_report();
  EXPECT_EQ(reports.size(), 4u + 1) << "one class of rows of four products, and the head";
  for (const GemmReport& report : reports)
    EXPECT_FALSE(report.chosen.empty());
  EXPECT_EQ(execute(1, part), guessed);
}

TEST_F(ModelWays, tokens_are_chosen_as_each_sequence_asks) {
  const TinyModel tiny(Kind::kLlama, 1);
  make_model(tiny);
  start();
  sampling_ = {{}, {.temperature = 1, .top_k = 1}, {.temperature = 100, .uniform = 0.999f}};
  const std::vector<int32_t> tokens = tiny.random_tokens(6, 3);
  const auto got = execute(1, {{0, {}, tokens}, {1, {}, tokens}, {2, {}, tokens}});
  const auto sampled = programs_.at(1)->sampled();
  ASSERT_EQ(sampled.size(), 3u);
  EXPECT_EQ(sampled[0], std::ranges::max_element(got[0]) - got[0].begin());
  EXPECT_EQ(sampled[1], sampled[0]);
  EXPECT_GT(sampled[2], 195) << "nearly uniform: the last of 203";
}

TEST_F(ModelWays, without_logits_only_tokens_are_fetched) {
  const TinyModel tiny(Kind::kLlama, 1);
  make_model(tiny);
  start();
  const std::vector<int32_t> tokens = tiny.random_tokens(6, 3);
  const auto got = execute(1, {{0, {}, tokens}});
  const size_t from = fake_cudart::num_calls();
  make(2, {{1, {}, tokens}}, {.fetch_logits = false});
  execute_to_end(2);
  EXPECT_EQ(programs_.at(2)->logits(), nullptr);
  EXPECT_EQ(programs_.at(2)->sampled()[0], std::ranges::max_element(got[0]) - got[0].begin());
  const auto calls = fake_cudart::calls();
  const auto last_copy = std::find_if(calls.rbegin(), calls.rend(), [](const auto& call) {
    return call.name == "cudaMemcpyAsync";
  });
  ASSERT_LT(from, calls.size());
  EXPECT_EQ(last_copy->bytes, sizeof(int32_t));
}

TEST_F(ModelWays, cleared_blocks_are_zero_and_others_are_not) {
  const TinyModel tiny(Kind::kLlama, 2);
  make_model(tiny);
  start();
  const std::vector<int32_t> tokens = tiny.random_tokens(9, 3);
  const Part decode{0, first(tokens, 8), between(tokens, 8, 9)};
  execute(1, {{0, {}, first(tokens, 8)}});
  const Logits whole = execute(2, {decode});
  model_->kv()->zero(batch_of({{3, {}, tokens}}).sequences[0].block_table);
  EXPECT_EQ(execute(3, {decode}), whole);
  const std::vector<int32_t> own = {batch_of({decode}).sequences[0].block_table[0]};
  model_->kv()->zero(own);
  EXPECT_NE(execute(4, {decode}), whole);
  EXPECT_THROW(model_->kv()->zero(std::vector<int32_t>{kBlocks}), std::invalid_argument);
}

}  // namespace
}  // namespace flowprefill::testing
