// ExecutorTest: an executor, a log of what it executed and the events it posted; used by
// executor_test and executor_device_test.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>

#include <memory>
#include <utility>
#include <vector>

#include "runtime/executor.h"
#include "scripted_program.h"

namespace flowprefill::testing {

// Sleeps on the queue's descriptor until `num_terminal` terminal events have come in all.
inline void wait_for_terminal(EventQueue& queue, std::vector<Event>& events, size_t num_terminal) {
  for (;;) {
    size_t num_found = 0;
    for (const Event& event : events) {
      num_found += is_terminal(event.kind) ? 1 : 0;
    }
    if (num_found >= num_terminal) {
      return;
    }
    pollfd descriptor{.fd = queue.fd(), .events = POLLIN, .revents = 0};
    ASSERT_EQ(poll(&descriptor, 1, kTimeoutMs), 1) << "no terminal event came";
    queue.pop_all(events);
  }
}

// A script that does something in segment `index` alone.
template <typename Action>
auto at(size_t index, Action action) {
  return [index, action](size_t i) {
    if (i == index)
      action();
  };
}

// Segments run on the executor's thread, so a script that dispatches, suspends or cancels does so
// at an exactly known place: what it asked for must be seen at the very next boundary.
class ExecutorTest : public ::testing::Test {
 protected:
  using Step = std::pair<uint64_t, size_t>;  // run id, segment
  using Steps = std::vector<Step>;

  void start(std::unique_ptr<Device> device = std::make_unique<Device>()) {
    executor_ = std::make_unique<Executor>(std::move(device));
    executor_->start();
  }

  // A run that logs its segments and then calls `script`.
  RunRef make(uint64_t id, size_t size, ScriptedProgram::Script script = {}) {
    return scripted_run(num_alive_, id, size, [this, id, script = std::move(script)](size_t i) {
      steps_.emplace_back(id, i);
      if (script) {
        script(i);
      }
    });
  }

  // After this, steps_ may be read: the executor has nothing to do until the next dispatch.
  void wait_for(size_t num_terminal) {
    wait_for_terminal(executor_->events(), events_, num_terminal);
  }

  void dispatch_and_wait(const RunRef& run, size_t num_terminal) {
    executor_->dispatch(run);
    wait_for(num_terminal);
  }

  // Waits for a run that is suspended or ends without a terminal event.
  void wait_until(const RunRef& run, RunState state) {
    for (int i = 0; i < kTimeoutMs && run->state() != state; ++i) {
      poll(nullptr, 0, 1);
    }
    ASSERT_EQ(run->state(), state);
  }

  size_t count(EventKind kind, uint64_t run_id) {
    executor_->events().pop_all(events_);
    size_t found = 0;
    for (const Event& event : events_) {
      found += event.kind == kind && event.run_id == run_id ? 1 : 0;
    }
    return found;
  }

  void TearDown() override {
    executor_.reset();
    events_.clear();
    EXPECT_EQ(num_alive_, 0) << "a run was not freed";
  }

  std::atomic<int> num_alive_{0};
  Steps steps_;
  std::vector<Event> events_;
  std::unique_ptr<Executor> executor_;
};

}  // namespace flowprefill::testing
