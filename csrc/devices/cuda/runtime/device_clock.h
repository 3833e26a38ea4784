// DeviceClock: puts the times of CUDA events on the scale of runtime/clock.h. Used by CudaDevice.
#pragma once

#include <cstdint>
#include <numeric>

#include "devices/cuda/runtime/stream_event.h"
#include "runtime/clock.h"

namespace flowprefill {

// CUDA tells only the time between two events. So an anchor is an event whose host time is known,
// and from there each event is timed against the one before: short distances, which a float holds
// exactly.
//
// Between anchors the clocks of host and device drift apart by some microseconds a second, and an
// idle hour would be rounded to a quarter of a millisecond: hence a new anchor after anchor_ns.
class DeviceClock {
 public:
  // Throws CudaError.
  explicit DeviceClock(int64_t anchor_ns) : max_age_ns_(anchor_ns), anchor_(StreamEvent::make()) {}

  bool is_stale() const { return !is_anchored_ || now_ns() - anchor_ns_ > max_age_ns_; }

  // Waits for a fresh event, which comes at once if the stream is idle: call it then only. Its time
  // is the middle between the last question it was not done at and the answer that it was: sleeping
  // until it is, which follows after spin_ns, would make all times late by the 20 to 60 us of
  // waking up.
  void anchor(cudaStream_t stream, const CallContext& context, int64_t spin_ns) {
    const int64_t recorded_ns = now_ns();
    anchor_.record(stream, context);
    anchor_ns_ = time_when_done(recorded_ns, recorded_ns + spin_ns, context);
    reference_ = &anchor_;
    reference_ns_ = anchor_ns_;
    is_anchored_ = true;
  }

  // Makes it stale: launches were given up, so the event last advanced to may be reused any moment.
  void forget() { is_anchored_ = false; }

  // Host time of an event that is done; after anchor().
  int64_t time_of(const StreamEvent& event, const CallContext& context) const {
    return reference_ns_ + event.ns_since(*reference_, context);
  }

  // The same; later events are timed against this one, which must stay as it is until the next
  // advance() or anchor().
  int64_t advance_to(const StreamEvent& event, const CallContext& context) {
    reference_ns_ = time_of(event, context);
    reference_ = &event;
    return reference_ns_;
  }

 private:
  int64_t time_when_done(int64_t not_done_ns, int64_t until_ns, const CallContext& context) const {
    int64_t asked_ns = not_done_ns;
    while (asked_ns < until_ns && !anchor_.is_done(context)) {
      not_done_ns = asked_ns;
      asked_ns = now_ns();
    }
    if (asked_ns >= until_ns)
      anchor_.wait(context);
    return std::midpoint(not_done_ns, now_ns());
  }

  const int64_t max_age_ns_;
  StreamEvent anchor_;
  int64_t anchor_ns_ = 0;  // host time
  bool is_anchored_ = false;
  const StreamEvent* reference_ = nullptr;
  int64_t reference_ns_ = 0;
};

}  // namespace flowprefill
