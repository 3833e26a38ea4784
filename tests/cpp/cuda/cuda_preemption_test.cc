// Preemption, suspension, cancellation and stop with lanes: nothing of any run is lost or mixed up.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <random>
#include <vector>

#include "cuda_fixture.h"

namespace flowprefill::testing {
namespace {

class CudaPreemptionTest : public CudaTest {
 protected:
  // Bytes of all copies between lanes and spills: all copies but inputs and results.
  static size_t spill_copies() {
    size_t bytes = 0;
    for (const fake_cudart::Call& call : fake_cudart::calls())
      bytes += call.name == "cudaMemcpyAsync" ? call.bytes : 0;
    return bytes;
  }

  // Run 2 comes while segment `at - 1` of run 1 is launched; when it has ended run 1 goes on.
  void preempt_at(ToyModel& model, size_t at, const std::shared_ptr<const CudaPlan>& plan) {
    before_launch_ = [&, at](Program& program, size_t segment) {
      if (is(program, 1) && segment + 1 == at)
        dispatch(2);
      if (is(program, 2) && segment + 1 == program.size())
        dispatch(1);
    };
    start();
    make(1, plan);
    make(2, plan);
    dispatch(1);
    wait_for(2);
    expect_finished(model, 1);
    expect_finished(model, 2);
  }
};

TEST_F(CudaPreemptionTest, preempted_at_every_boundary_gives_the_same_and_copies_the_live_set) {
  ToyModel model(3);
  for (const int32_t bucket : {kBucket, 0}) {
    const auto plan = model.plan(bucket);
    for (size_t at = 1; at < model.num_segments(); ++at) {
      options_.lanes.num_lanes = 1;
      preempt_at(model, at, plan);
      const LaneReport report = resources_->lanes().report();
      EXPECT_EQ(report.num_spills, 1u) << "at " << at;
      EXPECT_EQ(report.spilled_bytes, plan->live(at).bytes());
      EXPECT_EQ(report.restored_bytes, plan->live(at).bytes());
      EXPECT_EQ(spill_copies(), 2 * plan->live(at).bytes() + 3 * kInputBytes + 2 * kHidden.bytes)
          << "spill, restore, inputs for each entry, two results";
      tear_down();
      fake_cudart::reset();
    }
  }
}

TEST_F(CudaPreemptionTest, with_a_lane_for_each_nothing_is_copied) {
  ToyModel model(3);
  for (size_t at = 1; at < model.num_segments(); ++at) {
    preempt_at(model, at, model.plan());
    EXPECT_EQ(resources_->lanes().report().num_spills, 0u);
    EXPECT_EQ(count(EventKind::kSuspended), 1u);
    tear_down();
    fake_cudart::reset();
  }
}

// Runs 1 to 6 each preempt the one before in its middle; then all go on, last first.
TEST_F(CudaPreemptionTest, more_suspended_runs_than_lanes_all_come_back) {
  constexpr uint32_t kRuns = 6;
  for (const size_t device_spill_bytes : {size_t{1} << 20, size_t{100}, size_t{0}}) {
    options_.lanes.num_lanes = 2;
    options_.lanes.device_spill_bytes = device_spill_bytes;
    ToyModel model(4);
    before_launch_ = [&](Program& program, size_t segment) {
      for (uint32_t id = 1; id <= kRuns; ++id) {
        if (!is(program, id))
          continue;
        if (id < kRuns && segment == id && runs_.at(id + 1)->state() == RunState::kReady)
          dispatch(id + 1);
        if (id > 1 && segment + 1 == program.size())
          dispatch(id - 1);
      }
    };
    start();
    const auto plan = model.plan();
    for (uint32_t id = 1; id <= kRuns; ++id)
      make(id, plan);
    dispatch(1);
    wait_for(kRuns);
    for (uint32_t id = 1; id <= kRuns; ++id)
      expect_finished(model, id);
    EXPECT_EQ(resources_->lanes().report().num_spills, kRuns - 2);
    EXPECT_EQ(resources_->lanes().report().num_restores, kRuns - 2);
    tear_down();
    fake_cudart::reset();
  }
}

TEST_F(CudaPreemptionTest, random_preemption_of_many_runs_keeps_every_result) {
  for (uint32_t seed = 1; seed <= 8; ++seed) {
    std::mt19937 random(seed);
    options_.lanes.num_lanes = 1 + static_cast<int32_t>(seed % 3);
    options_.lanes.device_spill_bytes = 150;
    constexpr uint32_t kRuns = 12;
    ToyModel model(3);
    // Any run may be dispatched at any boundary; a displaced or suspended one is dispatched later.
    before_launch_ = [&](Program&, size_t) { dispatch_at_random(random, kRuns); };
    start(1 + static_cast<int>(seed % 4));
    for (uint32_t id = 1; id <= kRuns; ++id)
      make(id, model.plan());
    execute_all(kRuns);
    for (uint32_t id = 1; id <= kRuns; ++id)
      expect_finished(model, id);
    tear_down();
    fake_cudart::reset();
  }
}

TEST_F(CudaPreemptionTest, suspended_run_waits_in_its_lane_and_goes_on) {
  ToyModel model(3);
  before_launch_ = [&](Program& program, size_t segment) {
    if (is(program, 1) && segment == 4 && runs_.at(1)->accounting().num_preemptions == 0)
      executor_->suspend(*runs_.at(1));
  };
  start();
  make(1, model.plan());
  dispatch(1);
  for (int i = 0; i < kTimeoutMs && runs_.at(1)->state() != RunState::kSuspended; ++i)
    poll(nullptr, 0, 1);
  EXPECT_EQ(runs_.at(1)->cursor(), 5u);
  dispatch(1);
  wait_for(1);
  expect_finished(model, 1);
}

TEST_F(CudaPreemptionTest, run_cancelled_at_any_segment_frees_its_lane_and_disturbs_no_other_run) {
  ToyModel model(2);
  for (size_t at = 0; at < model.num_segments(); ++at) {
    options_.lanes.num_lanes = 1;
    before_launch_ = [&, at](Program& program, size_t segment) {
      if (is(program, 1) && segment == at)
        executor_->cancel(*runs_.at(1));
    };
    start();
    make(1, model.plan());
    make(2, model.plan());
    dispatch(1);
    wait_for(1);
    EXPECT_EQ(runs_.at(1)->state(), RunState::kCancelled);
    EXPECT_EQ(fake_cudart::num_waiting(), 0);
    dispatch(2);
    wait_for(2);
    expect_finished(model, 2);
    tear_down();
    fake_cudart::reset();
  }
}

// Cancelled while spilled, and destroyed on this thread while the executor works.
TEST_F(CudaPreemptionTest, spilled_run_that_is_cancelled_and_destroyed_gives_its_memory_back) {
  options_.lanes.num_lanes = 1;
  ToyModel model(3);
  before_launch_ = [&](Program& program, size_t segment) {
    if (is(program, 1) && segment == 4)
      dispatch(2);
  };
  start();
  for (uint32_t id = 1; id <= 3; ++id)
    make(id, model.plan());
  dispatch(1);
  wait_for(1);
  EXPECT_GT(resources_->lanes().report().device_spill_bytes, 0u);
  EXPECT_TRUE(executor_->cancel(*runs_.at(1)));
  wait_for(2);
  dispatch(3);
  events_.clear();
  runs_.erase(1);
  wait_for(1);
  programs_.erase(1);  // until here the executor's thread looks there
  expect_finished(model, 3);
  make(4, model.plan());
  dispatch(4);
  wait_for(2);
  EXPECT_EQ(resources_->lanes().report().device_spill_bytes, 0u);
  EXPECT_EQ(resources_->lanes().report().num_restores, 0u);
}

TEST_F(CudaPreemptionTest, stop_in_the_middle_cancels_the_run_with_nothing_in_flight) {
  ToyModel model(4);
  std::atomic<bool> is_reached{false};
  std::atomic<int> num_started{0};
  model.on_segment = [&](uint32_t, size_t segment) {
    ++num_started;
    if (segment == 3) {
      is_reached = true;
      is_reached.notify_all();
    }
  };
  start();
  make(1, model.plan());
  dispatch(1);
  is_reached.wait(false);
  executor_->stop();
  const int num_at_stop = num_started;
  EXPECT_TRUE(is_terminal(runs_.at(1)->state()));
  EXPECT_EQ(static_cast<size_t>(num_at_stop), runs_.at(1)->cursor());
  EXPECT_THROW(dispatch(1), std::exception);
}

}  // namespace
}  // namespace flowprefill::testing
