// Preemption, spills, cancellation of whole real programs: nothing of any run is lost or mixed up,
// to the bit.
#include <gtest/gtest.h>

#include <random>

#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

using ModelPreemptionTest = ModelTest;

TEST_F(ModelPreemptionTest, preempted_at_every_boundary_by_operators_gives_the_same_bits) {
  plan_options_.granularity = Granularity::kOperator;
  preempt_everywhere(TinyModel(Kind::kQwen, 2));
}

TEST_F(ModelPreemptionTest, preempted_at_every_boundary_within_a_budget_gives_the_same_bits) {
  plan_options_.budget_s = 1e-7;  // cuts operators into slices, the head too
  plan_options_.rates.weight_bytes_per_s = 1e11;
  preempt_everywhere(TinyModel(Kind::kWindow, 1));
}

TEST_F(ModelPreemptionTest, preempted_by_chunks_and_layers_gives_the_same_bits) {
  plan_options_.chunk_tokens = 7;
  plan_options_.granularity = Granularity::kChunk;
  preempt_everywhere(TinyModel(Kind::kTied, 1));
  tear_down();
  plan_options_.granularity = Granularity::kLayer;
  preempt_everywhere(TinyModel(Kind::kTied, 5));
}

// Runs 1 to 5 each preempt the one before; then all go on, last first.
TEST_F(ModelPreemptionTest, more_suspended_runs_than_lanes_spill_exactly_their_live_bytes) {
  constexpr uint32_t kRuns = 5;
  const TinyModel tiny(Kind::kLlama, 2);
  for (const size_t device_spill_bytes : {size_t{1} << 20, size_t{20000}, size_t{0}}) {
    options_.device_spill_bytes = device_spill_bytes;
    plan_options_.granularity = Granularity::kOperator;
    size_t spilled = 0;
    before_launch_ = [&](Program& program, size_t segment) {
      for (uint32_t id = 1; id <= kRuns; ++id) {
        if (!is(program, id))
          continue;
        if (id < kRuns && segment == id && runs_.at(id + 1)->state() == RunState::kReady) {
          dispatch(id + 1);
          spilled += id + 2 <= kRuns ? program.live_bytes(segment + 1) : 0;  // two have lanes
        }
        if (id > 1 && segment + 1 == program.size())
          dispatch(id - 1);
      }
    };
    make_model(tiny);
    start();
    for (uint32_t id = 1; id <= kRuns; ++id)
      make(id, {{.sequence = static_cast<int32_t>(id), .tokens = tiny.random_tokens(20, id)}});
    dispatch(1);
    wait_for(kRuns);
    for (uint32_t id = 1; id <= kRuns; ++id)
      expect_close(logits(id)[0], tiny.logits(tiny.random_tokens(20, id)),
                   "run " + std::to_string(id));
    const LaneReport report = model_->lane_report();
    EXPECT_EQ(report.num_spills, kRuns - 2);
    EXPECT_EQ(report.spilled_bytes, spilled);
    EXPECT_EQ(report.restored_bytes, spilled);
    tear_down();
    fake_cudart::reset();
  }
}

TEST_F(ModelPreemptionTest, random_preemption_of_many_runs_keeps_every_bit) {
  constexpr uint32_t kRuns = 8;
  const TinyModel tiny(Kind::kWindow, 2);
  for (uint32_t seed = 1; seed <= 3; ++seed) {
    std::mt19937 random(seed);
    options_.num_lanes = static_cast<int32_t>(seed);
    options_.run_ahead = 1 + static_cast<int>(seed);
    plan_options_.granularity = seed == 2 ? Granularity::kLayer : Granularity::kOperator;
    bool is_random = false;
    before_launch_ = [&](Program&, size_t) {
      if (is_random)
        dispatch_at_random(random, kRuns);
    };
    make_model(tiny);
    start();
    const auto parts = [&](uint32_t id) -> std::vector<Part> {
      const auto rows = static_cast<int32_t>(3 + 4 * id);
      return {{.sequence = static_cast<int32_t>(id % 8), .tokens = tiny.random_tokens(rows, id)}};
    };
    std::vector<Logits> undisturbed;
    for (uint32_t id = 1; id <= kRuns; ++id)
      undisturbed.push_back(execute(id, parts(id)));
    events_.clear();
    for (uint32_t id = 1; id <= kRuns; ++id)
      make(id, parts(id));
    is_random = true;
    execute_all(kRuns);
    for (uint32_t id = 1; id <= kRuns; ++id)
      EXPECT_EQ(logits(id), undisturbed[id - 1]) << "run " << id << ", seed " << seed;
    tear_down();
    fake_cudart::reset();
  }
}

}  // namespace
}  // namespace flowprefill::testing
