// What is decided before anything is launched: buckets, graph or eager, live sets, plans.
#include <gtest/gtest.h>

#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "cuda_fixture.h"
#include "devices/cuda/runtime/bucket.h"
#include "devices/cuda/runtime/cuda_program.h"

namespace flowprefill::testing {
namespace {

TEST(ChooseBucket, takes_the_smallest_that_holds_the_tokens) {
  const std::vector<int32_t> buckets = {1, 2, 4, 16, 64};
  EXPECT_EQ(choose_bucket(1, buckets), 1);
  EXPECT_EQ(choose_bucket(3, buckets), 4);
  EXPECT_EQ(choose_bucket(4, buckets), 4);
  EXPECT_EQ(choose_bucket(8, buckets), 16);
  EXPECT_EQ(choose_bucket(64, buckets), 64);
}

TEST(ChooseBucket, goes_eager_beyond_the_padding_and_beyond_the_largest) {
  const std::vector<int32_t> buckets = {1, 2, 4, 16, 64};
  EXPECT_EQ(choose_bucket(5, buckets), 0);  // 16 / 5 > 2
  EXPECT_EQ(choose_bucket(7, buckets), 0);
  EXPECT_EQ(choose_bucket(7, buckets, 3.0), 16);
  EXPECT_EQ(choose_bucket(31, buckets), 0);
  EXPECT_EQ(choose_bucket(32, buckets), 64);  // exactly 2
  EXPECT_EQ(choose_bucket(65, buckets), 0);
  EXPECT_EQ(choose_bucket(3, {}), 0);
}

TEST(ChooseBucket, refuses_bad_input) {
  const std::vector<int32_t> buckets = {4, 4};
  EXPECT_THROW(choose_bucket(1, buckets), std::invalid_argument);
  EXPECT_THROW(choose_bucket(0, {}), std::invalid_argument);
  EXPECT_THROW(choose_bucket(1, {}, 0.5), std::invalid_argument);
}

TEST(IsWorthGraph, depends_on_the_share_of_launching) {
  const GraphPolicy policy{.launch_s = 4e-6, .max_launch_share = 0.125};
  EXPECT_TRUE(is_worth_graph(100, 2e-3, policy));  // 0.4 ms of launching for 2 ms
  EXPECT_FALSE(is_worth_graph(10, 2e-3, policy));  // 0.04 ms
  EXPECT_TRUE(is_worth_graph(1, 0.0, policy));
}

TEST(LiveSet, joins_and_sorts) {
  const LiveSet set({{10, 5}, {0, 4}, {15, 5}, {2, 3}, {30, 0}});
  EXPECT_EQ(set.ranges(), (std::vector<LiveRange>{{0, 5}, {10, 10}}));
  EXPECT_EQ(set.bytes(), 15u);
  EXPECT_EQ(set.end(), 20u);
}

// Against the obvious: sets of bytes.
TEST(LiveSet, agrees_with_sets_of_bytes_on_random_ranges) {
  std::mt19937 random(1);
  const auto draw = [&] {
    std::vector<LiveRange> ranges(random() % 5);
    for (LiveRange& range : ranges)
      range = {random() % 40, random() % 12};
    return ranges;
  };
  const auto bytes_of = [](const LiveSet& set) {
    std::set<size_t> bytes;
    for (const LiveRange& range : set.ranges()) {
      for (size_t i = range.offset; i < range.end(); ++i)
        EXPECT_TRUE(bytes.insert(i).second);
    }
    EXPECT_EQ(bytes.size(), set.bytes());
    return bytes;
  };
  for (int i = 0; i < 500; ++i) {
    const LiveSet a(draw());
    const LiveSet b(draw());
    std::set<size_t> both = bytes_of(a);
    both.merge(bytes_of(b));
    std::set<size_t> left = bytes_of(a);
    for (const size_t byte : bytes_of(b))
      left.erase(byte);
    EXPECT_EQ(bytes_of(a.united(b)), both);
    EXPECT_EQ(bytes_of(a.without(b)), left);
  }
}

TEST(CudaPlan, knows_what_is_live_at_each_boundary) {
  ToyModel model(2);
  const auto plan = model.plan();
  ASSERT_EQ(plan->size(), 7u);
  EXPECT_EQ(plan->live(0), LiveSet());
  EXPECT_EQ(plan->live(1), LiveSet({kHidden}));
  EXPECT_EQ(plan->live(2), LiveSet({kHidden, kQkv}));
  EXPECT_EQ(plan->live(3), LiveSet({kHidden, kContext}));
  EXPECT_EQ(plan->live(4), LiveSet({kHidden}));
  EXPECT_EQ(plan->live(7), LiveSet({kHidden}));
  EXPECT_EQ(plan->lane_bytes(), kLaneBytes);
}

TEST(CudaPlan, refuses_what_cannot_be_right) {
  const auto nothing = [](const LaunchArgs&) {};
  const LiveSet hidden({kHidden});
  const auto plan = [](std::vector<CudaSegment> segments, LiveRange result) {
    return CudaPlan(8, std::move(segments), result);
  };
  EXPECT_THROW(plan({}, {}), std::invalid_argument);
  EXPECT_THROW(plan({CudaSegment{}}, {}), std::invalid_argument);
  EXPECT_THROW(CudaPlan(-1, {CudaSegment{.launch = nothing}}, {}), std::invalid_argument);
  EXPECT_NO_THROW(plan({CudaSegment{.access = {{}, hidden}, .launch = nothing}}, kHidden));
  EXPECT_THROW(plan({CudaSegment{.access = {hidden, {}}, .launch = nothing}}, {}),
               std::invalid_argument);
  EXPECT_THROW(plan({CudaSegment{.launch = nothing}}, kHidden), std::invalid_argument);
}

class CudaArguments : public CudaTest {};

TEST_F(CudaArguments, program_that_does_not_fit_is_refused_with_the_numbers) {
  make_resources();
  ToyModel model(1);
  const auto plan = model.plan();
  const auto make_program = [&](int32_t tokens, size_t input_bytes) {
    return CudaProgram(resources_, plan, tokens, std::vector<std::byte>(input_bytes));
  };
  EXPECT_THROW(make_program(0, 4), std::invalid_argument);
  EXPECT_THROW(make_program(kBucket + 1, 4), std::invalid_argument);
  EXPECT_THROW(make_program(1, kInputBytes + 1), std::invalid_argument);
  EXPECT_THROW(CudaProgram(resources_, nullptr, 1, {}), std::invalid_argument);
  options_.lanes.num_lanes = 0;
  EXPECT_THROW(make_resources(), std::invalid_argument);
  EXPECT_EQ(make_program(1, kInputBytes).live_bytes(2), kHidden.bytes + kQkv.bytes);
}

TEST_F(CudaArguments, device_refuses_a_depth_outside_1_to_4) {
  make_resources();
  for (const int depth : {0, 5, -1})
    EXPECT_THROW(CudaDevice(resources_, {.run_ahead = depth}), std::invalid_argument);
  EXPECT_THROW(CudaDevice(resources_, {.spin_s = -1}), std::invalid_argument);
  EXPECT_THROW(CudaDevice(resources_, {.anchor_s = 0}), std::invalid_argument);
  EXPECT_THROW(CudaDevice(nullptr, {}), std::invalid_argument);
}

TEST_F(CudaArguments, plan_larger_than_the_lanes_is_refused) {
  options_.lanes = {.lane_bytes = kLaneBytes - 1, .input_bytes = kInputBytes};
  resources_ = std::make_shared<CudaResources>(options_);
  ToyModel model(1);
  EXPECT_THROW(CudaProgram(resources_, model.plan(), 1, {}), std::invalid_argument);
}

}  // namespace
}  // namespace flowprefill::testing
