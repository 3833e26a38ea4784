// EventQueue: a stack of links that its consumer takes whole and turns round. See event_queue.h.
#include "runtime/event_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "runtime/run.h"

namespace flowprefill {

const char* to_string(EventKind kind) {
  switch (kind) {
    case EventKind::kFinished:
      return "finished";
    case EventKind::kSuspended:
      return "suspended";
    case EventKind::kCancelled:
      return "cancelled";
    case EventKind::kFailed:
      return "failed";
  }
  return "invalid";
}

EventQueue::EventQueue() : fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)) {
  if (fd_ < 0)
    throw std::system_error(errno, std::generic_category(), "eventfd");
}

EventQueue::~EventQueue() {
  std::vector<Event> dropped;
  pop_all(dropped);  // gives their references back
  close(fd_);
}

void EventQueue::push(RunRef run, EventKind kind, int64_t time_ns) noexcept {
  EventNode& node = is_terminal(kind) ? run->terminal_event_ : run->suspended_event_;
  // Acquire: the consumer that cleared it is done with the node.
  if (node.is_queued.load(std::memory_order_acquire)) {
    num_dropped_suspensions_.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  node.is_queued.store(true, std::memory_order_relaxed);
  node.event.kind = kind;
  node.event.cursor = static_cast<uint32_t>(run->cursor());
  node.event.run_id = run->id();
  node.event.time_ns = time_ns;
  node.event.run = std::move(run);
  node.next = head_.load(std::memory_order_relaxed);
  while (!head_.compare_exchange_weak(node.next, &node, std::memory_order_release,
                                      std::memory_order_relaxed)) {
  }
  // From here on the node and the run may be gone. The write fails only when 2^64 - 2 events are
  // waiting, and then the descriptor is readable anyway.
  if (is_terminal(kind))
    eventfd_write(fd_, 1);
}

size_t EventQueue::pop_all(std::vector<Event>& out) {
  // Reset first: an event pushed after the exchange below makes the descriptor readable again.
  eventfd_t count;
  eventfd_read(fd_, &count);
  EventNode* newest_first = head_.exchange(nullptr, std::memory_order_acquire);
  EventNode* oldest_first = nullptr;
  while (newest_first != nullptr) {
    EventNode* next = newest_first->next;
    newest_first->next = oldest_first;
    oldest_first = newest_first;
    newest_first = next;
  }
  size_t num_popped = 0;
  for (EventNode* node = oldest_first; node != nullptr; ++num_popped) {
    EventNode* next = node->next;
    Event event = std::move(node->event);  // its reference keeps the node alive
    node->is_queued.store(false, std::memory_order_release);
    out.push_back(std::move(event));
    node = next;
  }
  return num_popped;
}

}  // namespace flowprefill
