// Executor on a synchronous device: what happens at boundaries, exactly. Longer than usual: one
// file holds the whole contract of the loop.
#include "runtime/executor.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <array>
#include <stdexcept>
#include <string>
#include <thread>

#include "executor_fixture.h"

namespace flowprefill::testing {
namespace {

using enum RunState;

// ---- one run

TEST_F(ExecutorTest, run_executes_every_segment_in_order_and_finishes) {
  start();
  const RunRef run = make(1, 5);
  EXPECT_EQ(executor_->dispatch(run), nullptr);
  wait_for(1);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {1, 1}, {1, 2}, {1, 3}, {1, 4}}));
  EXPECT_EQ(run->state(), kFinished);
  EXPECT_EQ(run->cursor(), 5u);
  EXPECT_EQ(run->remaining_predicted_s(), 0.0);
  ASSERT_EQ(events_.size(), 1u);
  EXPECT_EQ(events_[0].kind, EventKind::kFinished);
  EXPECT_EQ(events_[0].run_id, 1u);
  EXPECT_EQ(events_[0].cursor, 5u);
  EXPECT_EQ(run->error(), "");
}

TEST_F(ExecutorTest, run_without_segments_finishes_at_once) {
  start();
  dispatch_and_wait(make(1, 0), 1);
  EXPECT_EQ(events_[0].kind, EventKind::kFinished);
}

TEST_F(ExecutorTest, run_without_segments_dispatched_during_another_finishes_too) {
  start();
  const RunRef empty = make(2, 0);
  const RunRef run = make(1, 3, at(0, [&] { executor_->dispatch(empty); }));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(empty->state(), kFinished);
  EXPECT_EQ(run->state(), kSuspended);
  dispatch_and_wait(run, 2);
}

TEST_F(ExecutorTest, segments_execute_on_the_named_thread) {
  start();
  std::array<char, 16> name{};
  executor_->dispatch(
      make(1, 1, [&](size_t) { pthread_getname_np(pthread_self(), name.data(), name.size()); }));
  wait_for(1);
  EXPECT_STREQ(name.data(), "fp-executor");
}

TEST_F(ExecutorTest, remaining_predicted_falls_with_the_cursor) {
  start();
  std::vector<double> remaining;
  flowprefill::Run* self = nullptr;
  const RunRef run =
      make(1, 3, [&](size_t) { remaining.push_back(self->remaining_predicted_s()); });
  self = run.get();
  dispatch_and_wait(run, 1);
  EXPECT_EQ(remaining, (std::vector<double>{1.5, 1.0, 0.5}));
}

// ---- preemption

TEST_F(ExecutorTest, preempt_at_every_boundary_then_resume_skips_and_repeats_nothing) {
  constexpr size_t kSize = 6;
  start();
  for (size_t boundary = 0; boundary + 1 < kSize; ++boundary) {
    steps_.clear();
    events_.clear();
    const RunRef urgent = make(2, 2);
    const RunRef run = make(1, kSize, at(boundary, [&] { executor_->dispatch(urgent); }));
    dispatch_and_wait(run, 1);
    EXPECT_EQ(run->state(), kSuspended);
    EXPECT_EQ(run->cursor(), boundary + 1);
    dispatch_and_wait(run, 2);
    Steps expected;
    for (size_t i = 0; i < kSize; ++i) {
      expected.emplace_back(1, i);
      if (i == boundary) {
        expected.insert(expected.end(), {{2, 0}, {2, 1}});
      }
    }
    EXPECT_EQ(steps_, expected);
    EXPECT_EQ(run->accounting().num_preemptions, 1u);
    EXPECT_EQ(count(EventKind::kSuspended, 1), 1u);
  }
}

TEST_F(ExecutorTest, dispatch_during_the_last_segment_lets_it_finish_first) {
  start();
  const RunRef urgent = make(2, 1);
  const RunRef run = make(1, 2, at(1, [&] { executor_->dispatch(urgent); }));
  dispatch_and_wait(run, 2);
  EXPECT_EQ(run->state(), kFinished);
  EXPECT_EQ(run->accounting().num_preemptions, 0u);
  EXPECT_EQ(count(EventKind::kSuspended, 1), 0u);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {1, 1}, {2, 0}}));
}

TEST_F(ExecutorTest, dispatch_twice_before_the_boundary_gives_the_first_back) {
  start();
  const RunRef first = make(2, 1);
  const RunRef second = make(3, 1);
  RunRef displaced;
  const RunRef run = make(1, 2, at(0, [&] {
                            executor_->dispatch(first);
                            displaced = executor_->dispatch(second);
                          }));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(displaced, first);
  EXPECT_EQ(first->state(), kReady);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {3, 0}}));
  executor_->cancel(*run);
}

TEST_F(ExecutorTest, dispatch_of_the_current_run_changes_nothing) {
  start();
  flowprefill::Run* self = nullptr;
  const RunRef run = make(1, 3, [&](size_t) { executor_->dispatch(RunRef(self)); });
  self = run.get();
  dispatch_and_wait(run, 1);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {1, 1}, {1, 2}}));
  EXPECT_EQ(run->accounting().num_preemptions, 0u);
  executor_->stop();
  EXPECT_EQ(count(EventKind::kFinished, 1), 1u);
  EXPECT_EQ(events_.size(), 1u);
}

TEST_F(ExecutorTest, dispatch_of_nothing_withdraws_what_was_waiting) {
  start();
  const RunRef other = make(2, 1);
  RunRef withdrawn;
  executor_->dispatch(make(1, 2, at(0, [&] {
                             executor_->dispatch(other);
                             withdrawn = executor_->dispatch(nullptr);
                           })));
  wait_for(1);
  EXPECT_EQ(withdrawn, other);
  EXPECT_EQ(other->state(), kReady);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {1, 1}}));
}

TEST_F(ExecutorTest, nested_preemptions_each_resume_where_they_stood) {
  start();
  const RunRef third = make(3, 1);
  const RunRef second = make(2, 2, at(0, [&] { executor_->dispatch(third); }));
  const RunRef first = make(1, 2, at(0, [&] { executor_->dispatch(second); }));
  dispatch_and_wait(first, 1);
  dispatch_and_wait(second, 2);
  dispatch_and_wait(first, 3);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {2, 0}, {3, 0}, {2, 1}, {1, 1}}));
}

// ---- cancel

TEST_F(ExecutorTest, cancel_of_a_ready_run_ends_it_on_the_callers_thread) {
  start();
  const RunRef run = make(1, 2);
  EXPECT_TRUE(executor_->cancel(*run));
  EXPECT_EQ(run->state(), kCancelled);
  EXPECT_EQ(count(EventKind::kCancelled, 1), 1u);
  EXPECT_FALSE(executor_->cancel(*run));
  EXPECT_THROW(executor_->dispatch(run), std::invalid_argument);
  EXPECT_EQ(count(EventKind::kCancelled, 1), 1u);
}

TEST_F(ExecutorTest, cancel_of_a_waiting_run_frees_it_and_does_not_disturb_the_current) {
  start();
  RunRef urgent = make(2, 1);
  const RunRef run = make(1, 3, at(0, [&] {
                            executor_->dispatch(urgent);
                            EXPECT_TRUE(executor_->cancel(*urgent));
                            std::vector<Event> events;
                            executor_->events().pop_all(events);
                            urgent.reset();
                            events.clear();
                            EXPECT_EQ(num_alive_, 1) << "the mailbox still holds the cancelled run";
                          }));
  executor_->dispatch(run);
  wait_until(run, kFinished);  // not wait_for: the script takes the events
  EXPECT_EQ(run->accounting().num_preemptions, 0u);
  EXPECT_EQ(executor_->stats().num_cancelled, 1u);
}

// The cancel comes after the executor's look at the mailbox: here by going round the executor.
TEST_F(ExecutorTest, mail_that_cannot_be_started_is_dropped_without_suspending_the_current) {
  start();
  const RunRef urgent = make(2, 1);
  const RunRef run = make(1, 3, at(0, [&] {
                            executor_->dispatch(urgent);
                            urgent->transition(kReady, kCancelled);
                          }));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {1, 1}, {1, 2}}));
  EXPECT_EQ(run->accounting().num_preemptions, 0u);
}

TEST_F(ExecutorTest, cancel_of_the_running_run_is_honoured_at_the_next_boundary) {
  start();
  flowprefill::Run* self = nullptr;
  const RunRef run = make(1, 4, at(1, [&] {
                            EXPECT_TRUE(executor_->cancel(*self));
                            EXPECT_TRUE(executor_->cancel(*self)) << "accepted, not ended yet";
                          }));
  self = run.get();
  dispatch_and_wait(run, 1);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {1, 1}}));
  EXPECT_EQ(run->state(), kCancelled);
  EXPECT_EQ(events_[0].cursor, 2u);
  EXPECT_FALSE(executor_->cancel(*run));
  EXPECT_EQ(count(EventKind::kCancelled, 1), 1u);
}

TEST_F(ExecutorTest, cancel_during_the_last_segment_wins_over_finished) {
  start();
  flowprefill::Run* self = nullptr;
  const RunRef run = make(1, 2, at(1, [&] { EXPECT_TRUE(executor_->cancel(*self)); }));
  self = run.get();
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kCancelled);
  EXPECT_EQ(run->cursor(), 2u);
  EXPECT_EQ(events_.size(), 1u);
  EXPECT_EQ(events_[0].kind, EventKind::kCancelled);
  EXPECT_EQ(executor_->stats().num_finished, 0u);
}

TEST_F(ExecutorTest, cancel_and_dispatch_before_one_boundary_cancels_one_and_starts_the_other) {
  start();
  flowprefill::Run* self = nullptr;
  const RunRef urgent = make(2, 2);
  const RunRef run = make(1, 3, at(0, [&] {
                            executor_->dispatch(urgent);
                            executor_->cancel(*self);
                          }));
  self = run.get();
  dispatch_and_wait(run, 2);
  EXPECT_EQ(run->state(), kCancelled);
  EXPECT_EQ(urgent->state(), kFinished) << "the cancel hit the wrong run";
  EXPECT_EQ(run->accounting().num_preemptions, 0u);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {2, 0}, {2, 1}}));
}

TEST_F(ExecutorTest, cancel_of_a_suspended_run_ends_it_and_closes_its_suspension) {
  start();
  const RunRef run = make(1, 3, [&](size_t) { executor_->dispatch(make(2, 1)); });
  dispatch_and_wait(run, 1);
  EXPECT_TRUE(executor_->cancel(*run));
  wait_for(2);
  EXPECT_EQ(run->state(), kCancelled);
  EXPECT_GT(run->accounting().suspended_ns, 0);
}

// ---- suspend

TEST_F(ExecutorTest, suspend_stops_at_the_next_boundary_and_dispatch_resumes) {
  start();
  flowprefill::Run* self = nullptr;
  const RunRef run = make(1, 3, at(0, [&] { EXPECT_TRUE(executor_->suspend(*self)); }));
  self = run.get();
  executor_->dispatch(run);
  wait_until(run, kSuspended);
  EXPECT_EQ(run->cursor(), 1u);
  EXPECT_FALSE(executor_->suspend(*run));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {1, 1}, {1, 2}}));
  EXPECT_EQ(count(EventKind::kSuspended, 1), 1u);
}

TEST_F(ExecutorTest, suspend_of_a_run_that_is_not_current_has_no_effect) {
  start();
  const RunRef run = make(1, 2);
  EXPECT_FALSE(executor_->suspend(*run));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->accounting().num_preemptions, 0u);
  EXPECT_FALSE(executor_->suspend(*run));
}

TEST_F(ExecutorTest, suspend_then_dispatch_of_the_current_run_goes_on) {
  start();
  flowprefill::Run* self = nullptr;
  const RunRef run = make(1, 2, at(0, [&] {
                            executor_->suspend(*self);
                            executor_->dispatch(RunRef(self));
                          }));
  self = run.get();
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kFinished);
  EXPECT_EQ(run->accounting().num_preemptions, 0u);
}

TEST_F(ExecutorTest, dispatch_then_suspend_of_the_current_run_suspends) {
  start();
  flowprefill::Run* self = nullptr;
  const RunRef run = make(1, 2, at(0, [&] {
                            executor_->dispatch(RunRef(self));
                            executor_->suspend(*self);
                          }));
  self = run.get();
  executor_->dispatch(run);
  wait_until(run, kSuspended);
  EXPECT_EQ(run->cursor(), 1u);
}

TEST_F(ExecutorTest, suspend_during_the_last_segment_still_finishes) {
  start();
  flowprefill::Run* self = nullptr;
  const RunRef run = make(1, 1, [&](size_t) { EXPECT_TRUE(executor_->suspend(*self)); });
  self = run.get();
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kFinished);
}

// ---- failure

TEST_F(ExecutorTest, segment_that_throws_fails_its_run_by_name_and_the_executor_goes_on) {
  start();
  const RunRef next = make(2, 1);
  const RunRef run = make(77, 4, at(2, [&] {
                            executor_->dispatch(next);
                            throw std::runtime_error("out of paper");
                          }));
  dispatch_and_wait(make(1, 1), 1);
  dispatch_and_wait(run, 3);
  EXPECT_EQ(run->state(), kFailed);
  EXPECT_EQ(run->cursor(), 2u);
  EXPECT_EQ(run->error(),
            "run 77: operator 'attention' of layer 2, rows 32..48 (segment 2 of 4) failed: "
            "out of paper");
  EXPECT_EQ(count(EventKind::kFailed, 77), 1u);
  EXPECT_EQ(next->state(), kFinished);
  EXPECT_THROW(executor_->dispatch(run), std::invalid_argument);
}

TEST_F(ExecutorTest, segment_that_throws_anything_fails_its_run) {
  start();
  const RunRef run = make(1, 1, [](size_t) { throw 42; });
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kFailed);
  EXPECT_NE(run->error().find("not a std::exception"), std::string::npos);
}

TEST_F(ExecutorTest, failure_of_a_cancelled_segment_is_reported_as_failed) {
  start();
  flowprefill::Run* self = nullptr;
  const RunRef run = make(1, 2, [&](size_t) {
    EXPECT_TRUE(executor_->cancel(*self));
    throw std::runtime_error("broken");
  });
  self = run.get();
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kFailed);
  EXPECT_EQ(events_.size(), 1u);
}

// ---- start and stop

TEST_F(ExecutorTest, dispatch_before_start_waits_in_the_mailbox) {
  executor_ = std::make_unique<Executor>(std::make_unique<Device>());
  executor_->dispatch(make(1, 1));
  EXPECT_TRUE(steps_.empty());
  executor_->start();
  wait_for(1);
}

TEST_F(ExecutorTest, stop_cancels_the_current_and_the_waiting_run_only) {
  start();
  const RunRef elsewhere = make(3, 1);
  const RunRef waiting = make(2, 1);
  std::atomic<bool> is_inside{false};
  std::atomic<bool> may_go_on{false};
  const RunRef run = make(1, 1000, at(0, [&] {
                            executor_->dispatch(waiting);
                            is_inside = true;
                            is_inside.notify_all();
                            may_go_on.wait(false);
                          }));
  executor_->dispatch(run);
  is_inside.wait(false);
  std::jthread stopper([&] { executor_->stop(); });
  wait_until(waiting, kCancelled);  // stop() has closed the mailbox
  may_go_on = true;
  may_go_on.notify_all();
  executor_->stop();  // both callers wait for the end
  EXPECT_EQ(run->state(), kCancelled);
  EXPECT_EQ(run->cursor(), 1u);
  EXPECT_EQ(elsewhere->state(), kReady);
  EXPECT_EQ(count(EventKind::kCancelled, 1), 1u);
  EXPECT_EQ(count(EventKind::kCancelled, 2), 1u);
}

TEST_F(ExecutorTest, dispatch_after_stop_throws_and_leaves_the_run) {
  start();
  executor_->stop();
  executor_->stop();
  const RunRef run = make(1, 1);
  EXPECT_THROW(executor_->dispatch(run), ExecutorStopped);
  EXPECT_EQ(run->state(), kReady);
  EXPECT_TRUE(executor_->cancel(*run)) << "runs can still be ended";
  EXPECT_EQ(count(EventKind::kCancelled, 1), 1u);
  EXPECT_THROW(executor_->start(), std::logic_error);
}

TEST_F(ExecutorTest, stop_without_start_cancels_the_waiting_run) {
  executor_ = std::make_unique<Executor>(std::make_unique<Device>());
  const RunRef run = make(1, 1);
  executor_->dispatch(run);
  executor_->stop();
  EXPECT_EQ(run->state(), kCancelled);
}

TEST_F(ExecutorTest, start_twice_and_stop_on_its_own_thread_throw) {
  start();
  EXPECT_THROW(executor_->start(), std::logic_error);
  executor_->dispatch(
      make(1, 1, [&](size_t) { EXPECT_THROW(executor_->stop(), std::logic_error); }));
  wait_for(1);
}

TEST_F(ExecutorTest, without_a_device_throws) {
  EXPECT_THROW(Executor(nullptr), std::invalid_argument);
  EXPECT_THROW(Executor(std::make_unique<Device>(), {.timeline_capacity = 3}),
               std::invalid_argument);
}

// ---- accounting and timeline

TEST_F(ExecutorTest, accounting_agrees_with_the_timeline) {
  start();
  const RunRef urgent = make(2, 2);
  const RunRef run = make(1, 3, at(1, [&] { executor_->dispatch(urgent); }));
  dispatch_and_wait(run, 1);
  dispatch_and_wait(run, 2);
  const auto records = executor_->timeline().snapshot().records;
  ASSERT_EQ(records.size(), 5u);
  const RunAccounting mine = run->accounting();
  const RunAccounting urgents = urgent->accounting();
  EXPECT_EQ(mine.first_start_ns, records[0].start_ns);
  EXPECT_GE(mine.last_end_ns, records[4].end_ns);
  EXPECT_GE(mine.running_ns, records[0].end_ns - records[0].start_ns + records[1].end_ns -
                                 records[1].start_ns + records[4].end_ns - records[4].start_ns);
  EXPECT_LE(mine.running_ns, mine.last_end_ns - mine.first_start_ns - mine.suspended_ns);
  EXPECT_EQ(urgents.last_blocking_ns, records[2].start_ns - urgents.dispatched_ns);
  EXPECT_GE(mine.suspended_ns, records[3].end_ns - records[2].start_ns);
  EXPECT_LE(mine.suspended_ns, records[4].start_ns - records[1].end_ns);
  EXPECT_EQ(mine.last_blocking_ns, records[4].start_ns - mine.dispatched_ns);
  EXPECT_GE(executor_->stats().max_blocking_ns, urgents.max_blocking_ns);
}

TEST_F(ExecutorTest, timeline_names_run_segment_and_rows_and_segments_never_overlap) {
  start();
  dispatch_and_wait(make(9, 3), 1);
  const auto records = executor_->timeline().snapshot().records;
  ASSERT_EQ(records.size(), 3u);
  for (uint32_t i = 0; i < 3; ++i) {
    EXPECT_EQ(records[i].run_id, 9u);
    EXPECT_EQ(records[i].segment, i);
    EXPECT_EQ(records[i].label.layer, static_cast<int32_t>(i));
    EXPECT_EQ(records[i].label.row_end, static_cast<int32_t>(16 * i + 16));
    EXPECT_STREQ(records[i].label.op, "attention");
    EXPECT_LE(records[i].start_ns, records[i].end_ns);
    if (i > 0) {
      EXPECT_EQ(records[i].start_ns, records[i - 1].end_ns);
    }
  }
}

TEST_F(ExecutorTest, stats_count_what_happened) {
  start();
  const RunRef run = make(1, 2, [&](size_t i) {
    if (i == 0) {
      executor_->dispatch(make(2, 1, [](size_t) { throw std::runtime_error("no"); }));
    }
  });
  dispatch_and_wait(run, 1);
  dispatch_and_wait(run, 2);
  const ExecutorStats stats = executor_->stats();
  EXPECT_EQ(stats.num_dispatched, 3u);
  EXPECT_EQ(stats.num_started, 3u);
  EXPECT_EQ(stats.num_suspended, 1u);
  EXPECT_EQ(stats.num_segments, 2u);
  EXPECT_EQ(stats.num_failed, 1u);
  EXPECT_EQ(stats.num_finished, 1u);
}

}  // namespace
}  // namespace flowprefill::testing
