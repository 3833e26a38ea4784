// EventQueue: order, wake-ups, what may be dropped and what never.
#include "runtime/event_queue.h"

#include <gtest/gtest.h>
#include <poll.h>

#include <map>
#include <thread>
#include <vector>

#include "runtime/clock.h"
#include "scripted_program.h"

namespace flowprefill {
namespace {

using enum EventKind;
using testing::kTimeoutMs;
using testing::Rounds;
using testing::scripted_run;

class EventQueueTest : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(num_alive_, 0); }
  RunRef make(uint64_t id) { return scripted_run(num_alive_, id, 1); }
  static bool is_readable(const EventQueue& queue, int timeout_ms = 0) {
    pollfd descriptor{.fd = queue.fd(), .events = POLLIN, .revents = 0};
    return poll(&descriptor, 1, timeout_ms) == 1;
  }

  std::atomic<int> num_alive_{0};
};

TEST_F(EventQueueTest, events_come_out_in_order_with_their_fields) {
  EventQueue queue;
  const RunRef first = make(1);
  const RunRef second = make(2);
  queue.push(first, kSuspended, 10);
  queue.push(second, kFailed, 20);
  queue.push(first, kFinished, 30);
  std::vector<Event> events;
  EXPECT_EQ(queue.pop_all(events), 3u);
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].kind, kSuspended);
  EXPECT_EQ(events[0].run, first);
  EXPECT_EQ(events[0].time_ns, 10);
  EXPECT_EQ(events[1].kind, kFailed);
  EXPECT_EQ(events[1].run_id, 2u);
  EXPECT_EQ(events[2].kind, kFinished);
  EXPECT_EQ(events[2].cursor, 0u);
  EXPECT_EQ(queue.pop_all(events), 0u);
}

TEST_F(EventQueueTest, only_a_terminal_event_wakes) {
  EventQueue queue;
  const RunRef run = make(1);
  queue.push(run, kSuspended, 1);
  EXPECT_FALSE(is_readable(queue));
  queue.push(run, kCancelled, 2);
  EXPECT_TRUE(is_readable(queue));
  std::vector<Event> events;
  queue.pop_all(events);
  EXPECT_FALSE(is_readable(queue));
}

TEST_F(EventQueueTest, second_suspension_before_the_first_was_taken_is_dropped_and_counted) {
  EventQueue queue;
  const RunRef run = make(1);
  const RunRef other = make(2);
  queue.push(run, kSuspended, 1);
  queue.push(run, kSuspended, 2);
  queue.push(other, kSuspended, 3);
  std::vector<Event> events;
  EXPECT_EQ(queue.pop_all(events), 2u);
  EXPECT_EQ(queue.num_dropped_suspensions(), 1u);
  queue.push(run, kSuspended, 4);
  EXPECT_EQ(queue.pop_all(events), 1u);
  EXPECT_EQ(events.back().time_ns, 4);
}

TEST_F(EventQueueTest, waiting_event_keeps_its_run_alive_and_destruction_frees_it) {
  {
    EventQueue queue;
    queue.push(make(1), kFinished, 1);
    EXPECT_EQ(num_alive_, 1);
    std::vector<Event> events;
    queue.pop_all(events);
    EXPECT_EQ(events[0].run->id(), 1u);
    queue.push(make(2), kSuspended, 1);
    EXPECT_EQ(num_alive_, 2);
  }
  EXPECT_EQ(num_alive_, 0);
}

TEST_F(EventQueueTest, popping_an_empty_queue_does_not_block) {
  EventQueue queue;
  std::vector<Event> events;
  EXPECT_EQ(queue.pop_all(events), 0u);
}

// Producers suspend and end runs while the consumer sleeps on the descriptor: every terminal event
// arrives once, in its producer's order, and the consumer never sleeps on one that is there.
TEST_F(EventQueueTest, concurrent_producers_lose_no_terminal_event_and_no_wake_up) {
  constexpr uint64_t kPerThread = 2000;
  constexpr uint64_t kThreads = 3;
  EventQueue queue;
  std::vector<std::jthread> producers;
  for (uint64_t t = 0; t < kThreads; ++t) {
    producers.emplace_back([&, t] {
      for (uint64_t i = 0; i < kPerThread; ++i) {
        RunRef run = make(t * kPerThread + i);
        queue.push(run, kSuspended, 0);
        queue.push(std::move(run), i % 2 == 0 ? kFinished : kCancelled, 0);
      }
    });
  }
  std::map<uint64_t, uint64_t> next;  // per producer
  std::vector<Event> events;
  for (uint64_t num_terminal = 0; num_terminal < kThreads * kPerThread;) {
    ASSERT_TRUE(is_readable(queue, kTimeoutMs)) << "lost after " << num_terminal;
    events.clear();
    queue.pop_all(events);
    for (const Event& event : events) {
      if (is_terminal(event.kind)) {
        ASSERT_EQ(event.run_id % kPerThread, next[event.run_id / kPerThread]++);
        ++num_terminal;
      }
    }
  }
  EXPECT_EQ(queue.num_dropped_suspensions(), 0u);
}

// Two events close together: the second arrives while the first one's consumer resets the
// descriptor. Nothing else follows until both were taken, so a lost wake-up stays lost.
TEST_F(EventQueueTest, event_during_the_reset_is_not_slept_on) {
  EventQueue queue;
  std::atomic<uint64_t> num_taken{0};
  std::atomic<bool> is_last{false};
  std::jthread producer([&](const std::stop_token& stop) {
    Rounds rounds(3000);
    for (uint64_t round = 0; rounds.next() && !stop.stop_requested(); ++round) {
      RunRef second = make(2 * round + 1);
      queue.push(make(2 * round), kFinished, 0);
      // From at once to past the time that a sleeping consumer takes to wake.
      const int64_t second_ns = now_ns() + static_cast<int64_t>(round % 100) * 300;
      while (now_ns() < second_ns) {
      }
      queue.push(std::move(second), kFinished, 0);
      while (num_taken < 2 * (round + 1) && !stop.stop_requested()) {
        std::this_thread::yield();
      }
    }
    is_last = true;
    queue.push(make(UINT64_MAX), kFinished, 0);
  });
  std::vector<Event> events;
  while (!is_last) {
    ASSERT_TRUE(is_readable(queue, kTimeoutMs)) << "lost after " << num_taken;
    events.clear();
    num_taken += queue.pop_all(events);
  }
}

}  // namespace
}  // namespace flowprefill
