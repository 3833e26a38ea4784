// Device: what the Executor launches segments on, as it sees it; called on its thread only.
// A device that completes work in the order it was launched may run ahead: see launch/throttle.
#pragma once

#include <cstddef>
#include <cstdint>

#include "runtime/segment.h"

namespace flowprefill {

// When a segment ran by its device's own account, nanoseconds on the clock of clock.h.
struct SegmentTime {
  int64_t start_ns = 0;
  int64_t end_ns = 0;
};

// The base class is the synchronous device: a segment is done when launch() returns.
// csrc/devices/cpu derives from it to lend its team to the segments.
//
// A device with run-ahead returns from launch() early, bounds the segments in flight in throttle(),
// and waits for them in drain(). The executor drains before a run leaves the device in any way
// (suspended, finished, cancelled, failed): so a run that is not running has nothing in flight, an
// asynchronous error is charged to the run that caused it, and the thread that takes
// the run's event may free or reuse its memory. The price is one launch gap per preemption.
class Device {
 public:
  virtual ~Device() = default;

  // Called once, before the first segment. An exception makes Executor::start() throw it.
  virtual void attach() {}

  // Called once, after the last segment, if attach() succeeded.
  virtual void detach() noexcept {}

  // Starts segment i of the program. May throw.
  virtual void launch(Program& program, size_t i) { program.execute(i, {}); }

  // Returns when at most the device's run-ahead many segments are in flight. May throw an error of
  // an earlier launch.
  virtual void throttle() {}

  // Returns when nothing is in flight; also called after launch() or throttle() threw. May throw.
  virtual void drain() {}

  // Whether the device measures segments itself, as one with run-ahead must: the host sees only
  // when it launched them. The timeline then gets these times, each as soon as it is known.
  virtual bool has_segment_times() const { return false; }

  // Gives the time of the next segment in the order of launches; false: not known yet, or never (it
  // did not complete). Asked after throttle() and after drain(), until it says false.
  virtual bool take_segment_time(SegmentTime& time) {
    (void)time;
    return false;
  }
};

}  // namespace flowprefill
