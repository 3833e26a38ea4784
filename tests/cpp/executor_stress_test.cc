// Executor under random dispatches, suspensions, cancellations and failures from several threads.
// Seeded; the interleaving is the operating system's. Checks the invariants of the executor's
// contract, not timing.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "executor_fixture.h"
#include "runtime/clock.h"

namespace flowprefill::testing {
namespace {

using Random = std::mt19937_64;

// What all checked programs of one test share.
struct Witness {
  std::atomic<int> num_alive{0};
  std::atomic<int> num_inside{0};       // segments executing at this moment
  std::atomic<uint64_t> num_starts{0};  // segments started so far, of all runs
  std::atomic<uint64_t> num_wrong{0};   // overlapping, repeated, skipped or late segments
  // A run of more than kLong / 2 segments waits before this one, so that it does not come to its
  // end while the test's thread has no core.
  std::atomic<size_t> may_reach{SIZE_MAX};
};

constexpr size_t kLong = 1'000'000;
constexpr size_t kAhead = 10'000;  // as far as a long run may get in one round

// Checks from inside that its segments come one by one, in order, never during another run's.
// next_ is deliberately not atomic: two threads executing one run are a race for ThreadSanitizer.
class CheckedProgram : public Program {
 public:
  CheckedProgram(Witness& witness, size_t size, size_t failing_segment)
      : witness_(witness), size_(size), failing_segment_(failing_segment) {
    ++witness_.num_alive;
  }
  ~CheckedProgram() override { --witness_.num_alive; }

  size_t size() const override { return size_; }
  SegmentLabel label(size_t i) const override {
    return {.op = "op", .layer = static_cast<int32_t>(i), .predicted_s = 1e-6};
  }
  void execute(size_t i, const ExecutionContext&) override {
    const uint64_t started = ++witness_.num_starts;
    if (i == 0) {
      first_start_ = started;
    }
    const bool is_alone = witness_.num_inside.fetch_add(1) == 0;
    if (!is_alone || i != next_ || i > failing_segment_) {
      ++witness_.num_wrong;
    }
    ++next_;
    if (size_ > kLong / 2) {
      do {
        std::this_thread::yield();  // lets the test's threads have the core
      } while (i >= witness_.may_reach);
    }
    witness_.num_inside.fetch_sub(1);
    if (i == failing_segment_) {
      throw std::runtime_error("meant to fail");
    }
  }

  size_t num_executed() const { return next_; }
  size_t failing_segment() const { return failing_segment_; }
  uint64_t first_start() const { return first_start_; }

 private:
  Witness& witness_;
  const size_t size_;
  const size_t failing_segment_;
  size_t next_ = 0;
  uint64_t first_start_ = 0;
};

RunRef random_run(Witness& witness, Random& random, uint64_t id) {
  const size_t size = random() % 24;
  const size_t failing = random() % 8 == 0 && size > 0 ? random() % size : SIZE_MAX;
  return make_run(id, std::make_unique<CheckedProgram>(witness, size, failing));
}

// Checks one run that has ended against the events it posted.
void expect_consistent(const RunRef& run, const std::vector<EventKind>& kinds) {
  const auto& program = static_cast<const CheckedProgram&>(run->program());
  ASSERT_TRUE(is_terminal(run->state())) << "run " << run->id() << " " << to_string(run->state());
  ASSERT_FALSE(kinds.empty()) << "run " << run->id() << " ended silently";
  ASSERT_EQ(std::count_if(kinds.begin(), kinds.end(), [](auto kind) { return is_terminal(kind); }),
            1);
  ASSERT_TRUE(is_terminal(kinds.back())) << "an event after the terminal one";
  ASSERT_STREQ(to_string(kinds.back()), to_string(run->state()));
  switch (run->state()) {
    case RunState::kFinished:
      ASSERT_EQ(program.num_executed(), program.size());
      ASSERT_EQ(run->cursor(), program.size());
      break;
    case RunState::kFailed:
      ASSERT_EQ(run->cursor(), program.failing_segment());
      ASSERT_EQ(program.num_executed(), run->cursor() + 1);
      ASSERT_NE(run->error(), "");
      break;
    default:
      ASSERT_EQ(program.num_executed(), run->cursor());
  }
}

class ExecutorStress : public ::testing::Test {
 protected:
  void SetUp() override {
    executor_ = std::make_unique<Executor>(std::make_unique<Device>());
    executor_->start();
  }
  void TearDown() override { witness_.may_reach = SIZE_MAX; }

  void note(std::vector<Event>& events) {
    for (Event& event : events) {
      kinds_[event.run_id].push_back(event.kind);
    }
    events.clear();
  }

  void expect_all_consistent(std::vector<RunRef>& runs) {
    EXPECT_EQ(witness_.num_wrong, 0u);
    uint64_t num_preemptions = 0;
    uint64_t num_suspended_events = 0;
    for (const RunRef& run : runs) {
      expect_consistent(run, kinds_[run->id()]);
      num_preemptions += run->accounting().num_preemptions;
      num_suspended_events += kinds_[run->id()].size() - 1;
    }
    const ExecutorStats stats = executor_->stats();
    EXPECT_EQ(stats.num_finished + stats.num_cancelled + stats.num_failed, runs.size());
    EXPECT_EQ(stats.num_suspended, num_preemptions);
    EXPECT_EQ(num_suspended_events + executor_->events().num_dropped_suspensions(),
              num_preemptions);
    executor_.reset();
    runs.clear();
    EXPECT_EQ(witness_.num_alive, 0) << "a run was not freed";
  }

  Witness witness_;
  std::map<uint64_t, std::vector<EventKind>> kinds_;
  std::unique_ptr<Executor> executor_;
};

// Everything at once, any run by any thread, dispatched again and again.
TEST_F(ExecutorStress, chaos_keeps_every_invariant) {
  constexpr uint64_t kRuns = 8'000 / FP_STRESS_DIVISOR;
  constexpr size_t kWindow = 24;  // runs that the threads play with at a time
  Random seed(20260101);
  std::vector<RunRef> runs;
  for (uint64_t id = 0; id < kRuns; ++id) {
    runs.push_back(random_run(witness_, seed, id));
  }
  std::atomic<size_t> base{0};
  const auto play = [&](uint64_t thread_seed) {
    Random random(thread_seed);
    for (size_t i; (i = base.fetch_add(1) / 8) < runs.size();) {
      const RunRef& run = runs[std::min(i + random() % kWindow, runs.size() - 1)];
      const uint64_t choice = random() % 20;
      try {
        if (choice < 13) {
          executor_->dispatch(run);
        } else if (choice < 14) {
          executor_->dispatch(nullptr);
        } else if (choice < 18) {
          executor_->suspend(*run);
        } else {
          if (!executor_->cancel(*run) && !is_terminal(run->state())) {
            ++witness_.num_wrong;  // refused, though it could have been ended
          }
        }
      } catch (const std::invalid_argument&) {
        // it has ended
      }
    }
  };
  std::vector<Event> events;
  {
    std::vector<std::jthread> threads;
    for (uint64_t t = 0; t < 3; ++t) {
      threads.emplace_back(play, seed());
    }
    while (base < 8 * runs.size()) {
      executor_->events().pop_all(events);
      std::this_thread::yield();
    }
  }
  executor_->stop();
  for (const RunRef& run : runs) {
    executor_->cancel(*run);  // those that have not ended
  }
  executor_->events().pop_all(events);
  note(events);
  expect_all_consistent(runs);
}

// As an engine does it: a run that is displaced or suspended goes back to a pool and from there to
// the executor again. If a single one were lost, the test would not end.
TEST_F(ExecutorStress, pool_of_displaced_and_suspended_runs_brings_every_run_to_its_end) {
  constexpr uint64_t kRuns = 500;
  Random seed(7);
  for (Rounds rounds(20); rounds.next();) {
    SetUp();
    kinds_.clear();
    std::vector<RunRef> runs;
    std::mutex mutex;
    std::deque<RunRef> pool;
    for (uint64_t id = 0; id < kRuns; ++id) {
      runs.push_back(random_run(witness_, seed, id));
      pool.push_back(runs.back());
    }
    std::atomic<size_t> num_ended{0};
    const auto give_back = [&](RunRef run) {
      const std::lock_guard lock(mutex);
      pool.insert(pool.begin() + static_cast<ptrdiff_t>(std::min<size_t>(pool.size(), 8)), run);
    };
    const auto feed = [&](uint64_t thread_seed) {
      Random random(thread_seed);
      while (num_ended < kRuns) {
        RunRef run;
        {
          const std::lock_guard lock(mutex);
          if (!pool.empty()) {
            run = std::move(pool.front());
            pool.pop_front();
          }
        }
        if (!run) {
          std::this_thread::yield();
          continue;
        }
        if (random() % 32 == 0) {
          executor_->cancel(*run);
        }
        try {
          if (RunRef displaced = executor_->dispatch(run)) {
            give_back(std::move(displaced));
          }
        } catch (const std::invalid_argument&) {
          continue;
        }
        if (random() % 4 == 0) {
          executor_->suspend(*run);
        }
        if (random() % 32 == 0) {
          executor_->cancel(*run);
        }
        if (random() % 2 == 0) {
          std::this_thread::yield();
        }
      }
    };
    std::vector<std::jthread> threads;
    for (uint64_t t = 0; t < 2; ++t) {
      threads.emplace_back(feed, seed());
    }
    std::vector<Event> events;
    while (num_ended < kRuns) {
      executor_->events().pop_all(events);
      for (const Event& event : events) {
        if (is_terminal(event.kind)) {
          ++num_ended;
        } else {
          give_back(event.run);
        }
      }
      note(events);
      std::this_thread::yield();
    }
    threads.clear();
    executor_->stop();
    EXPECT_EQ(executor_->events().pop_all(events), 0u);
    EXPECT_EQ(executor_->events().num_dropped_suspensions(), 0u);
    expect_all_consistent(runs);
  }
}

// After dispatch() has returned, at most one more segment of another run starts (the one whose
// boundary was passed already) before the dispatched run's first.
TEST_F(ExecutorStress, at_most_one_foreign_segment_starts_after_a_dispatch) {
  std::vector<RunRef> runs;
  std::vector<Event> events;
  uint64_t id = 0;
  const auto make = [&](size_t size) {
    runs.push_back(make_run(id++, std::make_unique<CheckedProgram>(witness_, size, SIZE_MAX)));
    return runs.back();
  };
  RunRef background = make(kLong);
  for (Rounds rounds(1'500); rounds.next();) {
    if (background->cursor() > kLong / 2) {
      executor_->cancel(*background);
      background = make(kLong);
    }
    executor_->events().pop_all(events);
    note(events);
    witness_.may_reach = background->cursor() + kAhead;
    ASSERT_EQ(executor_->dispatch(background), nullptr);
    const size_t cursor = background->cursor();
    while (background->cursor() == cursor) {  // until it is really going
      std::this_thread::yield();
    }
    const RunRef urgent = make(3);
    executor_->dispatch(urgent);
    const uint64_t num_starts = witness_.num_starts;
    witness_.may_reach = SIZE_MAX;  // the boundary may be behind the segment that waits
    wait_for_terminal(executor_->events(), events, 1);
    const auto& program = static_cast<const CheckedProgram&>(urgent->program());
    ASSERT_LE(program.first_start(), num_starts + 2);
    ASSERT_EQ(background->state(), RunState::kSuspended);
    note(events);
  }
  executor_->cancel(*background);
  background.reset();
  executor_->events().pop_all(events);
  note(events);
  expect_all_consistent(runs);
}

// A dispatch takes back an earlier suspend request, wherever the executor is meanwhile.
TEST_F(ExecutorStress, suspend_then_dispatch_always_goes_on) {
  std::vector<RunRef> runs;
  runs.push_back(make_run(0, std::make_unique<CheckedProgram>(witness_, kLong, SIZE_MAX)));
  flowprefill::Run& run = *runs[0];
  witness_.may_reach = kAhead;
  executor_->dispatch(runs[0]);
  for (Rounds rounds(20'000); run.cursor() < kLong / 2 && rounds.next();) {
    executor_->suspend(run);
    executor_->dispatch(runs[0]);
    const size_t cursor = run.cursor();
    witness_.may_reach = cursor + kAhead;
    const int64_t give_up_ns = now_ns() + int64_t{kTimeoutMs} * 1'000'000;
    while (run.cursor() == cursor) {
      ASSERT_LT(now_ns(), give_up_ns) << "the dispatch was lost in round " << rounds.index();
    }
  }
  witness_.may_reach = SIZE_MAX;
  executor_->cancel(run);
  std::vector<Event> events;
  wait_for_terminal(executor_->events(), events, 1);
  EXPECT_GE(run.accounting().num_preemptions, events.size() - 1);
  EXPECT_EQ(witness_.num_wrong, 0u);
}

// stop() in the middle of traffic: every run that the executor had gets its terminal event.
TEST_F(ExecutorStress, stop_during_traffic_leaves_no_run_running) {
  Random seed(11);
  for (Rounds rounds(150); rounds.next();) {
    executor_ = std::make_unique<Executor>(std::make_unique<Device>(),
                                           ExecutorOptions{.timeline_capacity = 64});
    kinds_.clear();
    executor_->start();
    std::vector<RunRef> runs;
    for (uint64_t id = 0; id < 16; ++id) {
      runs.push_back(random_run(witness_, seed, id));
    }
    {
      std::atomic<uint64_t> num_tried{0};
      std::jthread feeder([&, thread_seed = seed()] {
        Random random(thread_seed);
        for (; num_tried < 200; ++num_tried) {
          try {
            executor_->dispatch(runs[random() % runs.size()]);
          } catch (const std::invalid_argument&) {
            continue;
          } catch (const ExecutorStopped&) {
            return;
          }
        }
      });
      // After so many dispatches, not after some time: a yield takes long where others compute.
      for (const uint64_t wanted = seed() % 64; num_tried < wanted;) {
        std::this_thread::yield();
      }
      executor_->stop();
    }
    for (const RunRef& run : runs) {
      ASSERT_NE(run->state(), RunState::kRunning);
      executor_->cancel(*run);
    }
    std::vector<Event> events;
    executor_->events().pop_all(events);
    note(events);
    expect_all_consistent(runs);
  }
}

}  // namespace
}  // namespace flowprefill::testing
