// Run: transition table, requests, references, predictions.
#include "runtime/run.h"

#include <gtest/gtest.h>

#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "scripted_program.h"

namespace flowprefill {
namespace {

using enum RunState;
using testing::scripted_run;

class RunTest : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(num_alive_, 0); }
  RunRef make(size_t size = 4) { return scripted_run(num_alive_, 7, size); }

  std::atomic<int> num_alive_{0};
};

TEST_F(RunTest, table_all_pairs_are_as_designed) {
  const std::set<std::pair<RunState, RunState>> legal = {
      {kReady, kRunning},     {kReady, kCancelled},    {kRunning, kSuspended},
      {kRunning, kFinished},  {kRunning, kCancelled},  {kRunning, kFailed},
      {kSuspended, kRunning}, {kSuspended, kCancelled}};
  for (auto from : {kReady, kRunning, kSuspended, kFinished, kCancelled, kFailed}) {
    for (auto to : {kReady, kRunning, kSuspended, kFinished, kCancelled, kFailed}) {
      EXPECT_EQ(is_legal(from, to), legal.contains({from, to}))
          << to_string(from) << " -> " << to_string(to);
    }
  }
}

TEST_F(RunTest, transition_illegal_throws_and_leaves_the_state) {
  const RunRef run = make();
  EXPECT_THROW(run->transition(kReady, kFinished), std::logic_error);
  EXPECT_THROW(run->transition(kFinished, kRunning), std::logic_error);
  EXPECT_EQ(run->state(), kReady);
}

TEST_F(RunTest, transition_from_another_state_is_refused) {
  const RunRef run = make();
  EXPECT_FALSE(run->transition(kSuspended, kRunning));
  EXPECT_TRUE(run->transition(kReady, kRunning));
  EXPECT_FALSE(run->transition(kReady, kRunning));
  EXPECT_EQ(run->state(), kRunning);
}

TEST_F(RunTest, request_of_a_run_that_is_not_running_is_refused) {
  const RunRef run = make();
  EXPECT_FALSE(run->request_cancel());
  EXPECT_FALSE(run->request_suspend());
  run->transition(kReady, kRunning);
  EXPECT_FALSE(run->has_request());
  run->transition(kRunning, kFinished);
  EXPECT_FALSE(run->request_cancel());
  EXPECT_FALSE(run->request_suspend());
}

TEST_F(RunTest, cancel_request_leaves_only_cancelled_and_failed) {
  for (auto last : {kCancelled, kFailed}) {
    const RunRef run = make();
    run->transition(kReady, kRunning);
    EXPECT_TRUE(run->request_cancel());
    EXPECT_TRUE(run->has_request());
    EXPECT_FALSE(run->transition(kRunning, kFinished));
    EXPECT_FALSE(run->transition(kRunning, kSuspended));
    EXPECT_EQ(run->state(), kRunning);
    EXPECT_TRUE(run->transition(kRunning, last));
    EXPECT_EQ(run->state(), last);
  }
}

TEST_F(RunTest, suspend_request_ends_with_the_running_state) {
  const RunRef run = make();
  run->transition(kReady, kRunning);
  EXPECT_TRUE(run->request_suspend());
  EXPECT_FALSE(run->is_cancel_requested());
  EXPECT_TRUE(run->transition(kRunning, kSuspended));
  EXPECT_TRUE(run->transition(kSuspended, kRunning));
  EXPECT_FALSE(run->has_request()) << "a request hit the next time the run was running";
}

TEST_F(RunTest, suspend_request_can_be_taken_back_and_leaves_a_cancel) {
  const RunRef run = make();
  run->transition(kReady, kRunning);
  run->request_suspend();
  run->clear_suspend_request();
  EXPECT_FALSE(run->has_request());
  run->request_cancel();
  run->request_suspend();
  run->clear_suspend_request();
  EXPECT_TRUE(run->is_cancel_requested());
  EXPECT_EQ(run->state(), kRunning);
}

// Two threads walk over the same runs in step, so that they meet at many of them.
class RunRace : public RunTest {
 protected:
  static constexpr size_t kRuns = 60'000;

  // Calls first(run, i) and second(run, i) for every run, each on its own thread.
  template <typename First, typename Second>
  void race(const First& first, const Second& second) {
    for (size_t i = 0; i < kRuns; ++i) {
      runs_.push_back(make(0));
      runs_.back()->transition(kReady, kRunning);
    }
    std::atomic<size_t> positions[2] = {0, 0};
    const auto walk = [&](const auto& visit, int self) {
      for (size_t i = 0; i < kRuns; ++i) {
        positions[self] = i + 1;
        // Spins, to meet the other within nanoseconds; goes on alone if that one lost its core.
        for (int spin = 0; positions[1 - self] < i + 1 && spin < 2000; ++spin) {
        }
        visit(*runs_[i], i);
      }
    };
    std::jthread other([&] { walk(second, 1); });
    walk(first, 0);
  }
  void TearDown() override {
    runs_.clear();
    RunTest::TearDown();
  }

  std::vector<RunRef> runs_;
};

TEST_F(RunRace, transition_has_one_winner) {
  std::vector<char> first(kRuns);
  std::vector<char> second(kRuns);
  race([&](flowprefill::Run& run, size_t i) { first[i] = run.transition(kRunning, kSuspended); },
       [&](flowprefill::Run& run, size_t i) { second[i] = run.transition(kRunning, kCancelled); });
  for (size_t i = 0; i < kRuns; ++i) {
    ASSERT_EQ(first[i] + second[i], 1);
    ASSERT_EQ(runs_[i]->state(), first[i] != 0 ? kSuspended : kCancelled);
  }
}

TEST_F(RunRace, cancel_against_finish_is_decided_once) {
  std::vector<char> is_accepted(kRuns);
  std::vector<char> has_finished(kRuns);
  race([&](flowprefill::Run& run,
           size_t i) { has_finished[i] = run.transition(kRunning, kFinished); },
       [&](flowprefill::Run& run, size_t i) { is_accepted[i] = run.request_cancel(); });
  for (size_t i = 0; i < kRuns; ++i) {
    ASSERT_NE(is_accepted[i], has_finished[i]);
    ASSERT_EQ(runs_[i]->state(), has_finished[i] != 0 ? kFinished : kRunning);
  }
}

TEST_F(RunTest, remaining_predicted_of_a_new_run_is_the_sum) {
  EXPECT_DOUBLE_EQ(make(4)->remaining_predicted_s(), 2.0);
  EXPECT_DOUBLE_EQ(make(0)->remaining_predicted_s(), 0.0);
  EXPECT_EQ(make(4)->num_segments(), 4u);
}

TEST_F(RunTest, without_a_program_throws) {
  EXPECT_THROW(make_run(1, nullptr), std::invalid_argument);
}

TEST_F(RunTest, new_run_has_no_times_yet) {
  const RunAccounting accounting = make()->accounting();
  EXPECT_EQ(accounting.dispatched_ns, 0);
  EXPECT_EQ(accounting.first_start_ns, 0);
  EXPECT_EQ(accounting.num_preemptions, 0u);
}

TEST_F(RunTest, ref_copies_moves_and_assigns_keep_the_run_once) {
  RunRef first = make();
  RunRef second = first;
  RunRef third(first.get());  // a second holder from the raw pointer shares the count
  first = std::move(second);
  EXPECT_EQ(second, nullptr);
  const RunRef& alias = first;
  first = alias;
  first.reset();
  EXPECT_EQ(num_alive_, 1);
  third = RunRef::adopt(third.detach());
  EXPECT_EQ(num_alive_, 1);
  third.reset();
  EXPECT_EQ(num_alive_, 0);
}

TEST_F(RunTest, ref_dropped_by_many_threads_frees_once) {
  for (int round = 0; round < 100; ++round) {
    RunRef run = make();
    std::vector<std::jthread> threads;
    for (int i = 0; i < 3; ++i) {
      threads.emplace_back([copy = run]() mutable {
        RunRef other = copy;
        copy.reset();
      });
    }
    run.reset();
    threads.clear();
    EXPECT_EQ(num_alive_, 0);
  }
}

}  // namespace
}  // namespace flowprefill
