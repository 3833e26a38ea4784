// Which runs launch Hopper's attention, which is for long prompts, and which the portable kernel.
#include <gtest/gtest.h>

#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

// What runs of Hopper's attention and of the portable kernel, of two layers.
class ModelHopperTest : public ModelTest {
 protected:
  void SetUp() override {
    ModelTest::SetUp();
    fake_cudart::set_compute_capability(90);
    options_.max_tokens = 256;
    options_.max_context = 12 * kHopperBlock;
    options_.cuts.max_tile_rows = options_.max_tokens;
    plan_options_.granularity = Granularity::kNone;
  }

  void run(const std::vector<Part>& parts) {
    fake_kernels::reset();
    const TinyModel tiny(Kind::kLlama, 2);
    model_ = std::make_unique<CudaBackend>(tiny.graph(), options_);
    tiny.load_into(*model_);
    model_->allocate_cache(kHopperBlock, kBlocks);
    start();
    execute(1, parts);
    tear_down();
  }

  static int64_t num_ran(const char* name) { return std::ranges::count(fake_kernels::ran(), name); }

  static constexpr int32_t kHopperBlock = 2 * kBlockTokens;  // a size that the kernel takes
};

// Two prompts of too few rows for it. A graph of so many rows is for longer prompts too.
TEST_F(ModelHopperTest, lists_that_are_known_to_be_padding_are_left_out) {
  const std::vector<int32_t> tokens = TinyModel(Kind::kLlama).random_tokens(64, 1);
  for (const bool has_graphs : {true, false}) {
    options_.has_graphs = has_graphs;
    run({{0, {}, tokens}, {1, {}, tokens}});
    EXPECT_EQ(num_ran("attention"), 2);
    EXPECT_EQ(num_ran("attention_hopper"), has_graphs ? 2 : 0);
  }
}

// As decode steps: no run of their bucket has rows enough for it, so not even a graph launches it.
TEST_F(ModelHopperTest, plans_of_few_rows_have_no_lists_for_it) {
  run({{0, {}, {5}}, {1, {}, {6}}, {2, {}, {7}}});
  EXPECT_EQ(num_ran("attention"), 2);
  EXPECT_EQ(num_ran("attention_hopper"), 0);
  run({{0, {}, TinyModel(Kind::kLlama).random_tokens(96, 1)}});
  EXPECT_EQ(num_ran("attention"), 2);
  EXPECT_EQ(num_ran("attention_hopper"), 0) << "one of 128 rows would have it";
}

}  // namespace
}  // namespace flowprefill::testing
