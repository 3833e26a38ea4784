// Every CUDA call made to fail, one after another: one failed run, all others right, nothing left
// behind.
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_fixture.h"

namespace flowprefill::testing {
namespace {

constexpr uint32_t kRuns = 4;

// What a fault ends in.
struct Outcome {
  size_t num_failed = 0;
  size_t num_finished = 0;
  size_t num_faults = 0;
  size_t num_calls = 0;  // while runs were executing
  std::string call;      // that was made to fail
  std::string errors;    // of the failed runs
};

class CudaFaultTest : public CudaTest {
 protected:
  // Four runs over one lane, twice as many as there is room for: 2 preempts 1 (which is spilled), 1
  // is restored, 3 replays what was captured, 4 preempts 3. Then run 5 must finish.
  Outcome execute(const std::function<void()>& inject) {
    options_.lanes.num_lanes = 1;
    ToyModel model(2);
    before_launch_ = [&](Program& program, size_t segment) {
      if (is(program, 1) && segment == 2 && runs_.at(2)->state() == RunState::kReady)
        dispatch(2);
      if (is(program, 3) && segment == 4 && runs_.at(4)->state() == RunState::kReady)
        dispatch(4);
    };
    start();
    const auto plan = model.plan();
    for (uint32_t id = 1; id <= kRuns + 1; ++id)
      make(id, plan);
    const size_t calls_before = fake_cudart::num_calls();
    inject();
    for (uint32_t id = 1; id <= kRuns; ++id)
      execute_to_end(id);
    Outcome outcome;
    outcome.num_calls = fake_cudart::num_calls() - calls_before;
    outcome.num_faults = fake_cudart::num_faults();
    outcome.call = fake_cudart::last_fault();
    for (uint32_t id = 1; id <= kRuns; ++id) {
      if (runs_.at(id)->state() == RunState::kFailed) {
        ++outcome.num_failed;
        outcome.errors += runs_.at(id)->error() + "\n";
      } else {
        ++outcome.num_finished;
        expect_finished(model, id);
      }
    }
    after_runs_ = resources_->graphs().report();
    execute_to_end(kRuns + 1);
    is_alive_ = runs_.at(kRuns + 1)->state() == RunState::kFinished;
    if (is_alive_)
      expect_finished(model, kRuns + 1);
    EXPECT_EQ(count(EventKind::kFinished) + count(EventKind::kFailed), kRuns + 1)
        << "terminal events";
    tear_down();
    EXPECT_EQ(fake_cudart::live().handles(), 0) << fake_cudart::live().text();
    return outcome;
  }

  // Dispatches it until it has ended: again each time another run, which preempted it, has ended.
  void execute_to_end(uint32_t id) {
    const auto has_ended = [&] {
      return std::ranges::any_of(events_, [&](const Event& event) {
        return event.run_id == id && is_terminal(event.kind);
      });
    };
    while (!has_ended()) {
      if (runs_.at(id)->state() != RunState::kRunning)
        dispatch(id);
      const auto num_terminal = static_cast<size_t>(std::ranges::count_if(
          events_, [](const Event& event) { return is_terminal(event.kind); }));
      wait_for(num_terminal + 1);
      if (HasFatalFailure())
        return;
    }
  }

  GraphReport after_runs_;
  bool is_alive_ = false;
};

TEST_F(CudaFaultTest, without_a_fault_all_finish) {
  const Outcome outcome = execute([] {});
  EXPECT_EQ(outcome.num_finished, kRuns);
  EXPECT_GT(outcome.num_calls, 100u);
  EXPECT_TRUE(is_alive_);
  EXPECT_GT(after_runs_.num_captured, 0u);
  EXPECT_GT(after_runs_.num_replayed, 0u);
}

TEST_F(CudaFaultTest, fault_at_every_call_ends_as_exactly_one_failed_run) {
  options_.graphs.on_failure = CaptureFailure::kThrow;
  const size_t num_calls = execute([] {}).num_calls;
  size_t num_hit = 0;
  for (size_t n = 1; n <= num_calls; ++n) {
    fake_cudart::reset();
    const Outcome outcome = execute([n] { fake_cudart::fail_call(n, cudaErrorInvalidValue); });
    if (outcome.num_faults == 0)
      continue;  // the fault of an earlier call made the rest shorter
    ++num_hit;
    const bool is_free = outcome.call == "cudaFreeAsync" || outcome.call == "cudaGraphDestroy";
    EXPECT_EQ(outcome.num_failed, is_free ? 0u : 1u) << "call " << n << ", " << outcome.call;
    EXPECT_TRUE(is_alive_) << "call " << n << ", " << outcome.call;
    if (!is_free) {
      EXPECT_NE(outcome.errors.find(outcome.call), std::string::npos) << outcome.errors;
      EXPECT_NE(outcome.errors.find(" in operator '"), std::string::npos) << outcome.errors;
    }
    if (HasFailure())
      return;
  }
  EXPECT_EQ(num_hit, num_calls);
}

TEST_F(CudaFaultTest, with_fallback_a_fault_in_a_capture_fails_no_run) {
  const size_t num_calls = execute([] {}).num_calls;
  size_t num_fallbacks = 0;
  for (size_t n = 1; n <= num_calls; ++n) {
    fake_cudart::reset();
    const Outcome outcome = execute([n] { fake_cudart::fail_call(n, cudaErrorInvalidValue); });
    const size_t num_failed_captures = after_runs_.num_failed;
    num_fallbacks += num_failed_captures;
    const bool is_free = outcome.call == "cudaFreeAsync" || outcome.call == "cudaGraphDestroy";
    EXPECT_EQ(outcome.num_failed + num_failed_captures, is_free ? 0u : outcome.num_faults)
        << "call " << n << ", " << outcome.call;
    EXPECT_TRUE(is_alive_);
    if (HasFailure())
      return;
  }
  EXPECT_GT(num_fallbacks, 10u);
}

// The second failure hits what the first one's handling calls.
TEST_F(CudaFaultTest, two_calls_failing_one_after_another_fail_at_most_two_runs) {
  const size_t num_calls = execute([] {}).num_calls;
  for (size_t n = 1; n <= num_calls; ++n) {
    fake_cudart::reset();
    const Outcome outcome = execute([n] { fake_cudart::fail_call(n, cudaErrorInvalidValue, 2); });
    EXPECT_LE(outcome.num_failed, 2u) << "call " << n << ", " << outcome.call;
    EXPECT_TRUE(is_alive_) << "call " << n << ", " << outcome.call;
    if (HasFailure())
      return;
  }
}

// Memory short at any call: spills go to the host, captures are given up; else it is an error as
// others.
TEST_F(CudaFaultTest, out_of_memory_at_every_call_fails_at_most_one_run) {
  const size_t num_calls = execute([] {}).num_calls;
  for (size_t n = 1; n <= num_calls; ++n) {
    fake_cudart::reset();
    const Outcome outcome = execute([n] { fake_cudart::fail_call(n, cudaErrorMemoryAllocation); });
    EXPECT_LE(outcome.num_failed, 1u) << "call " << n << ", " << outcome.call;
    if (outcome.call == "cudaMallocFromPoolAsync" || outcome.call == "cudaGraphInstantiate") {
      EXPECT_EQ(outcome.num_failed, 0u);
    }
    EXPECT_TRUE(is_alive_);
    if (HasFailure())
      return;
  }
}

TEST_F(CudaFaultTest, polling_that_fails_ends_the_run) {
  device_options_.spin_s = kNever;
  for (size_t n = 1; n <= 20; ++n) {
    fake_cudart::reset();
    const Outcome outcome =
        execute([n] { fake_cudart::fail_call_of("cudaEventQuery", n, cudaErrorInvalidValue); });
    EXPECT_EQ(outcome.num_failed, 1u) << "query " << n;
    EXPECT_TRUE(is_alive_);
  }
}

// Set-up has no run to fail: the constructor or start() throws, and nothing stays.
TEST_F(CudaFaultTest, fault_at_every_call_of_the_set_up_is_thrown_and_leaves_nothing) {
  start();
  const size_t num_calls = fake_cudart::num_calls();
  tear_down();
  for (size_t n = 1; n <= num_calls; ++n) {
    fake_cudart::reset();
    fake_cudart::fail_call(n, cudaErrorInvalidValue);
    EXPECT_THROW(start(), CudaError) << "call " << n << ", " << fake_cudart::last_fault();
    EXPECT_EQ(fake_cudart::num_faults(), 1u);
    tear_down();
    EXPECT_EQ(fake_cudart::live().handles(), 0)
        << "call " << n << ", " << fake_cudart::last_fault() << ": " << fake_cudart::live().text();
  }
}

TEST_F(CudaFaultTest, fault_while_making_a_program_is_thrown_and_leaves_nothing) {
  ToyModel model(1);
  start();
  fake_cudart::fail_call_of("cudaHostAlloc", 1, cudaErrorMemoryAllocation);
  EXPECT_THROW(make(1, model.plan()), CudaError);
  make(1, model.plan());
  dispatch(1);
  wait_for(1);
  expect_finished(model, 1);
}

TEST_F(CudaFaultTest, fault_at_every_call_of_the_end_leaves_nothing) {
  for (size_t n = 1; n <= 40; ++n) {
    ToyModel model(1);
    start();
    for (uint32_t id = 1; id <= 2; ++id) {
      make(id, model.plan());
      dispatch(id);
      wait_for(id);
    }
    fake_cudart::fail_call(n, cudaErrorInvalidValue);
    tear_down();
    EXPECT_EQ(fake_cudart::live().handles(), 0)
        << "call " << n << ", " << fake_cudart::last_fault();
    fake_cudart::reset();
  }
}

// Times are measured between events; a later launch must not refer to one that was given up.
TEST_F(CudaFaultTest, times_after_a_failure_start_from_a_new_anchor) {
  ToyModel model(3);
  start(2);
  make(1, model.plan(0));
  make(2, model.plan(0));
  fake_cudart::fail_call_of("cudaLaunchKernel", 7, cudaErrorInvalidValue);
  dispatch(1);
  wait_for(1);
  ASSERT_EQ(runs_.at(1)->state(), RunState::kFailed);
  const int64_t dispatched_ns = now_ns();
  dispatch(2);
  wait_for(2);
  executor_->stop();
  size_t num_records = 0;
  for (const TimelineRecord& record : executor_->timeline().snapshot().records) {
    if (record.run_id != 2)
      continue;
    EXPECT_EQ(record.segment, num_records++);
    EXPECT_GE(record.start_ns, dispatched_ns);
    EXPECT_EQ(record.end_ns - record.start_ns,
              record.label.op == std::string("qkv_proj") ? 2000 : 1000);
  }
  EXPECT_EQ(num_records, model.num_segments());
}

// An illegal address in a kernel: found later, charged to the run and the operator that did it.
TEST_F(CudaFaultTest, device_beyond_use_fails_every_run_and_the_executor_lives) {
  ToyModel model(3);
  model.on_segment = [](uint32_t run_id, size_t segment) {
    if (run_id == 1 && segment == 4)
      fake_cudart::break_device(cudaErrorIllegalAddress);
  };
  start(2);
  for (uint32_t id = 1; id <= 3; ++id)
    make(id, model.plan());
  for (uint32_t id = 1; id <= 3; ++id) {
    dispatch(id);
    wait_for(id);
    EXPECT_EQ(runs_.at(id)->state(), RunState::kFailed);
    EXPECT_NE(runs_.at(id)->error().find("cudaErrorIllegalAddress"), std::string::npos)
        << runs_.at(id)->error();
  }
  EXPECT_EQ(count(EventKind::kFailed), 3u);
  // Found at segment 4 or near it: while waiting for the oldest in flight, or when launching the
  // next.
  EXPECT_NE(runs_.at(1)->error().find(" in operator '"), std::string::npos) << runs_.at(1)->error();
  EXPECT_GE(runs_.at(1)->cursor(), 2u);
  EXPECT_LE(runs_.at(1)->cursor(), 7u);
}

TEST_F(CudaFaultTest, launch_that_throws_something_else_fails_its_run_only) {
  ToyModel model(2);
  bool is_throwing = true;
  model.on_launch = [&](size_t segment) {
    if (is_throwing && segment == 3)
      throw std::runtime_error("no kernel for this shape");
  };
  start();
  for (uint32_t id = 1; id <= 2; ++id)
    make(id, model.plan());
  dispatch(1);
  wait_for(1);
  EXPECT_NE(runs_.at(1)->error().find("no kernel for this shape"), std::string::npos);
  is_throwing = false;
  dispatch(2);
  wait_for(2);
  expect_finished(model, 2);
}

}  // namespace
}  // namespace flowprefill::testing
