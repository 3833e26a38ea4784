// Executor with a device that runs ahead: what is in flight, when it drains, whose error it is.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "executor_fixture.h"
#include "runtime/clock.h"

namespace flowprefill::testing {
namespace {

using enum RunState;

// Queues launches and does the oldest when more than `depth` are in flight, as a stream would.
class RunAheadDevice : public Device {
 public:
  struct Counts {
    size_t max_in_flight = 0;
    size_t num_in_flight = 0;
    int num_drains = 0;
    int num_attached = 0;
    int num_detached = 0;
  };

  RunAheadDevice(size_t depth, Counts& counts) : depth_(depth), counts_(counts) {}

  void attach() override { ++counts_.num_attached; }
  void detach() noexcept override { ++counts_.num_detached; }
  void launch(Program& program, size_t i) override {
    in_flight_.emplace_back(&program, i);
    counts_.num_in_flight = in_flight_.size();
    counts_.max_in_flight = std::max(counts_.max_in_flight, in_flight_.size());
  }
  void throttle() override {
    while (in_flight_.size() > depth_) {
      complete();
    }
  }
  void drain() override {
    ++counts_.num_drains;
    while (!in_flight_.empty()) {
      complete();
    }
  }

 private:
  void complete() {
    const auto [program, i] = in_flight_.front();
    in_flight_.pop_front();
    counts_.num_in_flight = in_flight_.size();
    program->execute(i, {});
  }

  const size_t depth_;
  Counts& counts_;
  std::deque<std::pair<Program*, size_t>> in_flight_;
};

class RunAheadTest : public ExecutorTest {
 protected:
  void start_ahead(size_t depth) { start(std::make_unique<RunAheadDevice>(depth, counts_)); }

  RunAheadDevice::Counts counts_;
};

TEST_F(RunAheadTest, run_finishes_only_when_everything_launched_is_done) {
  for (size_t depth : {1, 2, 4}) {
    steps_.clear();
    events_.clear();
    counts_ = {};
    start_ahead(depth);
    dispatch_and_wait(make(1, 6), 1);
    EXPECT_EQ(steps_.size(), 6u);
    EXPECT_EQ(counts_.num_in_flight, 0u);
    EXPECT_EQ(counts_.max_in_flight, depth + 1);
    executor_->stop();
    EXPECT_EQ(counts_.num_attached, 1);
    EXPECT_EQ(counts_.num_detached, 1);
  }
}

// Segment 0's work, done while segment 2 is being launched, dispatches: nothing after segment 2.
TEST_F(RunAheadTest, preempted_run_has_nothing_in_flight_when_the_next_one_starts) {
  start_ahead(2);
  const RunRef urgent = make(2, 2);
  const RunRef run = make(1, 8, at(0, [&] { executor_->dispatch(urgent); }));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(steps_, (Steps{{1, 0}, {1, 1}, {1, 2}, {2, 0}, {2, 1}}));
  EXPECT_EQ(run->cursor(), 3u);
  dispatch_and_wait(run, 2);
  EXPECT_EQ(steps_.size(), 10u);
}

TEST_F(RunAheadTest, cancelled_run_has_nothing_in_flight_at_its_event) {
  start_ahead(2);
  flowprefill::Run* self = nullptr;
  const RunRef run = make(1, 8, at(1, [&] { executor_->cancel(*self); }));
  self = run.get();
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kCancelled);
  EXPECT_EQ(counts_.num_in_flight, 0u);
  EXPECT_EQ(steps_.size(), 4u);
}

TEST_F(RunAheadTest, error_found_by_throttle_fails_the_run_and_drains_the_rest) {
  start_ahead(2);
  const RunRef run = make(1, 8, at(1, [&] { throw std::runtime_error("launch failure"); }));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kFailed);
  EXPECT_NE(run->error().find("launch failure"), std::string::npos);
  EXPECT_EQ(counts_.num_in_flight, 0u);
  dispatch_and_wait(make(2, 3), 2);
  EXPECT_EQ(count(EventKind::kFinished, 2), 1u);
}

TEST_F(RunAheadTest, error_found_while_finishing_fails_the_run) {
  start_ahead(4);
  const RunRef run = make(1, 3, at(2, [&] { throw std::runtime_error("late"); }));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kFailed);
  EXPECT_EQ(run->cursor(), 3u);
  EXPECT_NE(run->error().find("late"), std::string::npos);
}

// The bad segment is in flight when the mailbox asks for another run.
TEST_F(RunAheadTest, error_found_while_suspending_fails_the_run_that_caused_it) {
  start_ahead(4);
  const RunRef urgent = make(2, 1);
  const RunRef run = make(1, 8, [&](size_t i) {
    if (i == 0) {
      executor_->dispatch(urgent);
    }
    if (i == 3) {
      throw std::runtime_error("late");
    }
  });
  dispatch_and_wait(run, 2);
  EXPECT_EQ(run->state(), kFailed);
  EXPECT_EQ(urgent->state(), kFinished);
  EXPECT_EQ(count(EventKind::kSuspended, 1), 0u);
}

TEST_F(RunAheadTest, second_error_while_draining_after_the_first_is_told_too) {
  start_ahead(1);
  const RunRef run =
      make(1, 4, [&](size_t i) { throw std::runtime_error(i == 0 ? "first" : "second"); });
  dispatch_and_wait(run, 1);
  EXPECT_NE(run->error().find("failed: first; and while draining: second"), std::string::npos)
      << run->error();
  EXPECT_EQ(events_.size(), 1u);
}

// Cancels a run between the executor's decision to suspend it and the change of its state.
class CancelWhileDraining : public Device {
 public:
  explicit CancelWhileDraining(std::function<void()> cancel) : cancel_(std::move(cancel)) {}
  void drain() override { cancel_(); }

 private:
  const std::function<void()> cancel_;
};

TEST_F(RunAheadTest, cancel_accepted_while_suspending_ends_the_run) {
  flowprefill::Run* self = nullptr;
  start(std::make_unique<CancelWhileDraining>([&] { EXPECT_TRUE(executor_->cancel(*self)); }));
  const RunRef run = make(1, 3, [&](size_t) { executor_->suspend(*self); });
  self = run.get();
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kCancelled);
  EXPECT_EQ(run->cursor(), 1u);
  EXPECT_EQ(events_.back().kind, EventKind::kCancelled);
  EXPECT_EQ(count(EventKind::kCancelled, 1), 1u);
}

// Tells the time of a segment when the one after it is launched, as a device one segment behind.
class MeasuringDevice : public Device {
 public:
  void launch(Program& program, size_t i) override {
    program.execute(i, {});
    num_done_ = num_launched_++;
  }
  void drain() override { num_done_ = num_launched_; }
  bool has_segment_times() const override { return true; }
  bool take_segment_time(SegmentTime& time) override {
    if (num_told_ == num_done_) {
      return false;
    }
    ++num_told_;
    time = {.start_ns = 100 * num_told_, .end_ns = 100 * num_told_ + 50};
    return true;
  }

 private:
  int64_t num_launched_ = 0;
  int64_t num_done_ = 0;
  int64_t num_told_ = 0;
};

TEST_F(RunAheadTest, timeline_takes_the_times_of_a_device_that_measures) {
  start(std::make_unique<MeasuringDevice>());
  uint64_t num_recorded_in_last = 0;
  const RunRef run =
      make(1, 4, at(3, [&] { num_recorded_in_last = executor_->timeline().size(); }));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(num_recorded_in_last, 2u) << "segment 2 was not known to be done then";
  const TimelineSnapshot snapshot = executor_->timeline().snapshot();
  ASSERT_EQ(snapshot.records.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(snapshot.records[i].segment, i);
    EXPECT_EQ(snapshot.records[i].start_ns, 100 * static_cast<int64_t>(i + 1));
    EXPECT_EQ(snapshot.records[i].end_ns, 100 * static_cast<int64_t>(i + 1) + 50);
  }
}

TEST_F(RunAheadTest, segment_that_did_not_complete_is_not_in_the_timeline) {
  start(std::make_unique<MeasuringDevice>());
  executor_->dispatch(make(1, 4, at(2, [&] { throw std::runtime_error("no"); })));
  wait_for(1);
  dispatch_and_wait(make(2, 1), 2);
  const TimelineSnapshot snapshot = executor_->timeline().snapshot();
  ASSERT_EQ(snapshot.records.size(), 3u);
  EXPECT_EQ(snapshot.records[1].segment, 1u);
  EXPECT_EQ(snapshot.records[2].run_id, 2u);
  EXPECT_EQ(snapshot.records[2].start_ns, 300);
}

// ---- accounting

// Works at the pace of the clock, one segment after the other, however early they were launched.
class PacedDevice : public Device {
 public:
  static constexpr int64_t kSegmentNs = 5'000'000;

  PacedDevice(size_t depth, bool has_times) : depth_(depth), has_times_(has_times) {}

  void launch(Program& program, size_t i) override {
    program.execute(i, {});
    const int64_t start_ns = std::max(now_ns(), end_ns_);
    end_ns_ = start_ns + kSegmentNs;
    in_flight_.push_back({.start_ns = start_ns, .end_ns = end_ns_});
  }
  void throttle() override { wait(depth_); }
  void drain() override { wait(0); }
  bool has_segment_times() const override { return has_times_; }
  bool take_segment_time(SegmentTime& time) override {
    if (done_.empty()) {
      return false;
    }
    time = done_.front();
    done_.pop_front();
    return true;
  }

 private:
  void wait(size_t num_left) {
    while (in_flight_.size() > num_left) {
      std::this_thread::sleep_for(std::chrono::nanoseconds(in_flight_.front().end_ns - now_ns()));
      done_.push_back(in_flight_.front());
      in_flight_.pop_front();
    }
  }

  const size_t depth_;
  const bool has_times_;
  int64_t end_ns_ = 0;
  std::deque<SegmentTime> in_flight_;
  std::deque<SegmentTime> done_;
};

class AccountingTest : public ExecutorTest, public ::testing::WithParamInterface<bool> {
 protected:
  void start_paced() { start(std::make_unique<PacedDevice>(2, GetParam())); }

  // The run had the device for `num_segments` of them, and for nothing outside of its own time.
  static void expect_charged(const RunRef& run, int64_t num_segments) {
    const RunAccounting times = run->accounting();
    EXPECT_GE(times.running_ns, num_segments * PacedDevice::kSegmentNs);
    EXPECT_LE(times.running_ns, times.last_end_ns - times.first_start_ns - times.suspended_ns);
  }
};

INSTANTIATE_TEST_SUITE_P(, AccountingTest, ::testing::Bool(), [](const auto& info) {
  return info.param ? std::string("device_tells_times") : std::string("device_tells_nothing");
});

TEST_P(AccountingTest, finished_run_is_charged_what_was_in_flight_at_its_end) {
  start_paced();
  std::vector<RunRef> runs;
  for (const size_t size : {1, 2, 3, 7}) {
    runs.push_back(make(size, size));
    executor_->dispatch(runs.back());
    wait_for(runs.size());
    expect_charged(runs.back(), static_cast<int64_t>(size));
  }
  for (size_t i = 1; i < runs.size(); ++i) {
    EXPECT_GE(runs[i]->accounting().first_start_ns, runs[i - 1]->accounting().last_end_ns);
  }
}

TEST_P(AccountingTest, suspended_run_is_charged_its_own_in_flight_and_the_next_one_is_not) {
  start_paced();
  const RunRef urgent = make(2, 2);
  const RunRef run = make(1, 5, at(1, [&] { executor_->dispatch(urgent); }));
  dispatch_and_wait(run, 1);
  EXPECT_EQ(run->state(), kSuspended);
  EXPECT_EQ(run->cursor(), 2u);
  const RunAccounting suspended = run->accounting();
  EXPECT_GE(suspended.running_ns, 2 * PacedDevice::kSegmentNs);
  EXPECT_EQ(suspended.running_ns, suspended.last_end_ns - suspended.first_start_ns);
  expect_charged(urgent, 2);
  EXPECT_GE(urgent->accounting().first_start_ns, suspended.last_end_ns);
  EXPECT_EQ(urgent->accounting().last_blocking_ns,
            urgent->accounting().first_start_ns - urgent->accounting().dispatched_ns);
  EXPECT_GE(urgent->accounting().last_blocking_ns, PacedDevice::kSegmentNs);
  // The first run's own start may have taken longer still: the executor slept before it.
  EXPECT_EQ(executor_->stats().max_blocking_ns,
            std::max(run->accounting().max_blocking_ns, urgent->accounting().last_blocking_ns));
  dispatch_and_wait(run, 2);
  expect_charged(run, 5);
  EXPECT_GE(run->accounting().suspended_ns, 2 * PacedDevice::kSegmentNs);
}

TEST_P(AccountingTest, failed_and_cancelled_runs_are_charged_what_was_in_flight) {
  start_paced();
  const RunRef failed = make(1, 5, at(2, [&] { throw std::runtime_error("no"); }));
  dispatch_and_wait(failed, 1);
  EXPECT_EQ(failed->state(), kFailed);
  expect_charged(failed, 2);
  flowprefill::Run* self = nullptr;
  const RunRef cancelled = make(2, 5, at(1, [&] { executor_->cancel(*self); }));
  self = cancelled.get();
  dispatch_and_wait(cancelled, 2);
  EXPECT_EQ(cancelled->state(), kCancelled);
  expect_charged(cancelled, 2);
}

// It leaves the device without having had it: the time of the run before is not its own.
TEST_P(AccountingTest, run_that_executed_nothing_is_charged_nothing) {
  start_paced();
  dispatch_and_wait(make(1, 2), 1);
  const RunRef empty = make(2, 0);
  dispatch_and_wait(empty, 2);
  EXPECT_EQ(empty->state(), kFinished);
  EXPECT_EQ(empty->accounting().running_ns, 0);
  EXPECT_EQ(empty->accounting().last_end_ns, 0);
}

class BrokenDevice : public Device {
 public:
  explicit BrokenDevice(bool& is_detached) : is_detached_(is_detached) {}
  void attach() override { throw std::runtime_error("no such device"); }
  void detach() noexcept override { is_detached_ = true; }

 private:
  bool& is_detached_;
};

TEST_F(RunAheadTest, attach_that_throws_comes_out_of_start_and_waiting_runs_are_cancelled) {
  bool is_detached = false;
  executor_ = std::make_unique<Executor>(std::make_unique<BrokenDevice>(is_detached));
  const RunRef run = make(1, 1);
  executor_->dispatch(run);
  EXPECT_THROW(executor_->start(), std::runtime_error);
  EXPECT_EQ(run->state(), kCancelled);
  EXPECT_THROW(executor_->dispatch(make(2, 1)), ExecutorStopped);
  EXPECT_FALSE(is_detached);
}

}  // namespace
}  // namespace flowprefill::testing
