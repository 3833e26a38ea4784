// Event: what the executor tells the engine about a run; EventNode: its place inside the Run.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime/ref.h"

namespace flowprefill {

// A suspension is posted just before the state changes to kSuspended, so that a run's terminal
// event is always its last; dispatching the run again on seeing it is safe.
enum class EventKind : uint8_t { kFinished, kSuspended, kCancelled, kFailed };

const char* to_string(EventKind kind);

inline constexpr bool is_terminal(EventKind kind) {
  return kind != EventKind::kSuspended;
}

struct Event {
  EventKind kind = EventKind::kFinished;
  uint32_t cursor = 0;  // the run's next segment when it happened
  uint64_t run_id = 0;
  int64_t time_ns = 0;
  RunRef run;  // keeps the run, its error and accounting alive while the event is handled
};

// A link of the event queue. Each run carries its own two (one for its only terminal event, one for
// suspensions), so posting an event needs no memory and cannot fail.
struct EventNode {
  Event event;
  EventNode* next = nullptr;
  std::atomic<bool> is_queued{false};
};

}  // namespace flowprefill
