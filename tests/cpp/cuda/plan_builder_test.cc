// PlanBuilder alone: the numbers by which plans share graphs.
#include "devices/cuda/backend/plan_builder.h"

#include <gtest/gtest.h>

#include <memory>
#include <set>

#include "../graph_fixture.h"
#include "devices/cuda/backend/gemm_candidates.h"
#include "fake_cudart.h"

namespace flowprefill::testing {
namespace {

class PlanBuilderTest : public ::testing::Test {
 protected:
  // Of a bucket's plan for one sequence.
  static int32_t variant(PlanBuilder& builder, int32_t bucket) {
    const auto plans =
        builder.plans_to_warm(bucket, {.granularity = Granularity::kNone, .rates = {}});
    return plans.front()->plan->segment(0).shape.variant;
  }

  PlanBuilder builder(size_t max_variants, RunOutput output = RunOutput::kLogits) const {
    return {graph_,
            kernels_,
            {.buckets = {1, 2, 4, 8, 16},
             .max_sequences = 1,
             .block_tokens = 16,
             .cuts = kCudaCuts,
             .output = output,
             .max_variants = max_variants}};
  }

  const int reset_ = (fake_cudart::reset(), 0);
  const std::shared_ptr<const ModelGraph> graph_ =
      std::make_shared<const ModelGraph>(with_sampling(llama_graph({.num_layers = 1})));
  const DeviceWeights weights_{*graph_, 0};
  const DeviceKvCache cache_{
      {.layers = 1, .kv_heads = 2, .head_dim = 64, .block_tokens = 16, .blocks = 4}, 0};
  const std::unique_ptr<GemmSelector> gemms_ =
      make_gemm_selector({.compute_capability = 80, .num_multiprocessors = 4}, {});
  const OperatorKernels kernels_{weights_, cache_, *gemms_, 0};
};

TEST_F(PlanBuilderTest, plans_that_lie_alike_have_one_number_and_others_another) {
  PlanBuilder plans = builder(100);
  PlanBuilder of_scores = builder(100, RunOutput::kScores);
  std::set<int32_t> found;
  for (const int32_t bucket : {1, 2, 4, 8, 16}) {
    EXPECT_TRUE(found.insert(variant(plans, bucket)).second);
    EXPECT_TRUE(found.insert(variant(of_scores, bucket)).second);
  }
  // What it holds lies as before.
  const PlanOptions cut{.granularity = Granularity::kLayer, .rates = {}};
  EXPECT_EQ(plans.plans_to_warm(4, cut).front()->plan->segment(0).shape.variant, variant(plans, 4));
}

// Layouts come with every length of prompts and cut of attention: the map of them has a bound. A
// number that was forgotten never means another layout, or a graph of that would be replayed.
TEST_F(PlanBuilderTest, no_number_is_given_twice_when_layouts_are_forgotten) {
  PlanBuilder plans = builder(3);
  std::set<int32_t> found;
  for (const int32_t tokens : {1, 2, 3, 4, 5, 6, 7, 8}) {
    PlanOptions chunks{.granularity = Granularity::kChunk, .rates = {}};
    chunks.chunk_tokens = tokens;
    const auto of = [&] {
      return plans.plans_to_warm(16, chunks).front()->plan->segment(0).shape.variant;
    };
    const int32_t first = of();
    EXPECT_TRUE(found.insert(first).second) << tokens;
    EXPECT_EQ(of(), first) << "the plan itself is kept";
  }
  // A plan of its own.
  PlanOptions forgotten{.granularity = Granularity::kChunk, .budget_s = 1, .rates = {}};
  forgotten.chunk_tokens = 1;
  const auto again = plans.plans_to_warm(16, forgotten).front();
  EXPECT_TRUE(found.insert(again->plan->segment(0).shape.variant).second)
      << "more than three layouts ago";
}

}  // namespace
}  // namespace flowprefill::testing
