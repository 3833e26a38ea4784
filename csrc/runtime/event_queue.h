// EventQueue: runs' events on their way from the executor (and cancelling threads) to the engine.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/event.h"

namespace flowprefill {

// Lock-free queue of events with an eventfd that becomes readable when a terminal event is there.
//
// It is a list whose links live in the runs themselves: pushing is one compare-exchange, taking all
// is one exchange. So it needs no capacity setting and cannot overflow: it holds at most one
// terminal event and one suspension per live run. A suspension of a run whose previous one has not
// been taken yet is dropped and counted; no caller acts on a suspension alone. Unlike a ring whose
// slots are claimed first and published later, a push becomes visible at once, so a producer that
// loses its CPU half-way cannot hide events behind it.
//
// Threads: push and pop_all from any thread; both never block. Events come out in push order.
class EventQueue {
 public:
  EventQueue();  // throws std::system_error if no eventfd can be had
  ~EventQueue();
  EventQueue(const EventQueue&) = delete;
  EventQueue& operator=(const EventQueue&) = delete;

  // Posts an event of the run; the queue holds a reference until it is taken. For a terminal kind
  // the caller must be the one whose transition ended the run: at most one per run. One writer at
  // a time may post suspensions of a run (the executor). Cost: a terminal event writes the eventfd.
  void push(RunRef run, EventKind kind, int64_t time_ns) noexcept;

  // Appends all waiting events to `out`, oldest first, and resets the eventfd. Returns how many.
  size_t pop_all(std::vector<Event>& out);

  // Readable (poll, epoll, asyncio's add_reader) while a terminal event may be waiting.
  int fd() const { return fd_; }

  // Suspensions dropped because the run's previous one had not been taken.
  uint64_t num_dropped_suspensions() const {
    return num_dropped_suspensions_.load(std::memory_order_relaxed);
  }

 private:
  std::atomic<EventNode*> head_{nullptr};  // newest first
  std::atomic<uint64_t> num_dropped_suspensions_{0};
  int fd_;
};

}  // namespace flowprefill
