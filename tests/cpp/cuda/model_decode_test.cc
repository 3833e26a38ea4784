// Decode steps of many sequences: one graph each, the tokens of one sequence alone, the buckets
// they are padded to, which of those are captured ahead, where their activations lie.
#include <gtest/gtest.h>

#include "devices/cuda/backend/plan_shape.h"
#include "devices/cuda/runtime/bucket.h"
#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

constexpr int32_t kSequences = 256;

class ModelDecodeTest : public ModelTest {
 protected:
  void SetUp() override {
    ModelTest::SetUp();
    options_.max_tokens = kSequences;
    options_.max_sequences = kSequences;
    options_.num_lanes = 1;
    plan_options_.budget_s = 1;  // no step takes longer
  }

  // A block for each sequence in a batch, and another for when it is alone.
  void make_decoder(const std::optional<PlanOptions>& warm = std::nullopt) {
    model_ = std::make_unique<CudaBackend>(tiny_.graph(), options_);
    tiny_.load_into(*model_);
    model_->allocate_cache(kBlockTokens, 2 * kSequences);
    start(warm);
  }

  // The next token of sequences first, first + 1, ...
  static Batch step(int32_t first, int32_t context, const std::vector<int32_t>& tokens,
                    int32_t first_block = 0) {
    Batch batch;
    batch.tokens = tokens;
    for (int32_t i = 0; i < static_cast<int32_t>(tokens.size()); ++i) {
      batch.sequences.push_back({.row_begin = i,
                                 .rows = 1,
                                 .context = context,
                                 .block_table = {first_block + (first + i) * 37 % kSequences}});
    }
    return batch;
  }

  std::vector<int32_t> decode(Batch batch) {
    const uint32_t id = ++id_;
    add(id, program_of(std::move(batch), {.fetch_logits = false}));
    execute_to_end(id);
    EXPECT_EQ(runs_.at(id)->state(), RunState::kFinished) << runs_.at(id)->error();
    const auto sampled = programs_.at(id)->sampled();
    return {sampled.begin(), sampled.end()};
  }

  std::vector<int32_t> tokens(int32_t count) const { return tiny_.random_tokens(count, 4); }

  const TinyModel tiny_{Kind::kQwen, 2};
  uint32_t id_ = 0;
};

TEST_F(ModelDecodeTest, step_of_256_sequences_is_one_launch_and_gives_the_tokens_of_each_alone) {
  make_decoder();
  std::vector<std::vector<int32_t>> together = {tokens(kSequences)};
  for (int32_t i = 0; i < kBlockTokens; ++i) {
    const size_t graphs = fake_cudart::count("cudaGraphLaunch");
    const size_t kernels = fake_cudart::count("cudaLaunchKernel");
    together.push_back(decode(step(0, i, together.back())));
    EXPECT_EQ(programs_.at(id_)->size(), 1u);
    EXPECT_EQ(programs_.at(id_)->bucket(), kSequences);
    if (i < 2)
      continue;  // the first step is eager, the second captured
    EXPECT_EQ(fake_cudart::count("cudaGraphLaunch") - graphs, 1u);
    EXPECT_EQ(fake_cudart::count("cudaLaunchKernel") - kernels, 0u);
  }
  for (int32_t sequence = 0; sequence < kSequences; ++sequence) {
    for (int32_t i = 0; i < kBlockTokens; ++i) {
      const auto of = static_cast<size_t>(sequence);
      const auto at = static_cast<size_t>(i);
      ASSERT_EQ(decode(step(sequence, i, {together[at][of]}, kSequences)).front(),
                together[at + 1][of])
          << "sequence " << sequence << ", step " << i;
    }
  }
  EXPECT_EQ(model_->graph_report().num_failed, 0u) << model_->graph_report().last_failure;
}

TEST_F(ModelDecodeTest, step_of_any_size_is_one_segment_of_a_bucket_with_bounded_padding) {
  make_decoder();
  for (int32_t n = 1; n <= kSequences; ++n) {
    const auto program = program_of(step(0, 0, tokens(n)));
    EXPECT_EQ(program->size(), 1u) << n;
    ASSERT_GE(program->bucket(), n);
    const int32_t most = n <= 16 ? n : n <= 64 ? n / 2 : n / 4;
    EXPECT_LE(program->bucket() - n, most) << n;
  }
}

TEST_F(ModelDecodeTest, buckets_of_decode_steps_are_17) {
  using Buckets = std::vector<int32_t>;
  EXPECT_EQ(default_buckets(kDecodeRows),
            (Buckets{1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256}));
  EXPECT_EQ(default_buckets(100).back(), 96);
  const Buckets more = default_buckets(1024);
  EXPECT_EQ(Buckets(more.begin() + 17, more.end()), (Buckets{384, 512, 768, 1024}));
}

// The bucket's plan assumes 1024 tokens of context each; these have next to none.
TEST_F(ModelDecodeTest, step_below_the_budget_is_whole_whatever_context_its_bucket_assumes) {
  make_decoder();
  const double attention_s = 2 * 64 * 1025 * 4.0 * 256 / plan_options_.rates.attention_flops_per_s;
  plan_options_.budget_s = attention_s / 4;
  EXPECT_EQ(program_of(step(0, 3, tokens(64)))->size(), 1u);
  plan_options_.budget_s = 1e-12;
  EXPECT_GT(program_of(step(0, 3, tokens(64)))->size(), 8u) << "above it is cut";
}

// Padding may not make of a step within the budget one that is far beyond.
TEST_F(ModelDecodeTest, padding_beyond_the_budget_is_cut) {
  options_.buckets = {64};
  make_decoder();
  plan_options_.rates.gemm_flops_per_s = 1e12;
  plan_options_.budget_s = 1;
  double own_s = 0;
  const auto own = program_of(step(0, 0, tokens(32)));
  for (size_t i = 0; i < own->size(); ++i)
    own_s += own->label(i).predicted_s / 2;  // 64 rows
  plan_options_.budget_s = own_s * 1.1;
  const auto padded = program_of(step(0, 0, tokens(32)));
  EXPECT_EQ(padded->bucket(), 64);
  EXPECT_GT(padded->size(), 1u);
}

// A prefill of few sequences computes logits of 64 at most; those of a decode step are its rows.
TEST_F(ModelDecodeTest, packed_prefill_has_places_for_64_sequences) {
  make_decoder();
  Batch packed = step(0, 0, tokens(120));
  packed.sequences.resize(60);
  for (int32_t i = 0; i < 60; ++i) {
    packed.sequences[static_cast<size_t>(i)].row_begin = 2 * i;
    packed.sequences[static_cast<size_t>(i)].rows = 2;
  }
  const auto lane_of = [&](Batch batch) { return program_of(std::move(batch))->workspace_bytes(); };
  const size_t prefill = lane_of(packed);
  const size_t steps = lane_of(step(0, 0, tokens(120)));
  EXPECT_EQ(program_of(packed)->bucket(), 128);
  EXPECT_GE(steps - prefill, size_t{64} * 208 * sizeof(float)) << "logits of 64 more";
}

// A product with its rope reads the normed rows while it writes queries: where the gated rows are
// narrow, nothing else would keep these apart.
TEST_F(ModelDecodeTest, operators_that_one_kernel_may_compute_read_and_write_apart) {
  const LlamaShape all_heads_have_keys{.hidden_size = 4096,
                                       .intermediate_size = 11008,
                                       .num_layers = 1,
                                       .num_heads = 32,
                                       .num_kv_heads = 32,
                                       .head_dim = 128};
  for (const ModelGraph& graph : {llama_graph({}), llama_graph(all_heads_have_keys)}) {
    const Layout layout(graph, lane_rules(graph), {.rows = 8, .tile_rows = 8, .sequences = 8});
    const LiveRange normed = layout.all(tensor_named(graph, "normed"));
    const LiveRange q = layout.all(tensor_named(graph, "q"));
    EXPECT_TRUE(normed.end() <= q.offset || q.end() <= normed.offset) << graph.tensor(0).columns;
  }
}

TEST_F(ModelDecodeTest, graphs_are_captured_ahead_from_the_largest_bucket_as_far_as_they_fit) {
  options_.buckets = {2, 4, 8};
  options_.warm_tokens = 8;
  make_decoder(plan_options_);
  const GraphReport all = model_->graph_report();
  ASSERT_EQ(all.num_executables, 6u) << "of one sequence and of as many as rows";
  tear_down();
  options_.graph_bytes = all.bytes / 5 * 3;  // those of few rows are smaller
  make_decoder(plan_options_);
  const auto replays = [this](int32_t rows) {
    const uint64_t before = model_->graph_report().num_replayed;
    decode(step(0, 0, tokens(rows)));
    return model_->graph_report().num_replayed - before;
  };
  EXPECT_EQ(model_->graph_report().num_executables, 3u);
  EXPECT_EQ(replays(8), 1u);
  EXPECT_EQ(replays(2), 0u) << "no room was left";
  EXPECT_LE(model_->graph_report().bytes, options_.graph_bytes);
}

}  // namespace
}  // namespace flowprefill::testing
