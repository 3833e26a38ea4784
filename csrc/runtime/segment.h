// What the executor runs: a Program, an ordered list of segments, each with a label.
// Implemented by csrc/devices (and by the tests); called by Run and Executor.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flowprefill {

class Team;  // csrc/devices/cpu/team.h

// What the device lends to a segment for as long as that executes.
struct ExecutionContext {
  Team* team = nullptr;  // the CPU device's threads; no other device has any
};

// What one segment covers, for the timeline, error messages and predictions.
struct SegmentLabel {
  const char* op = "";  // first operator's name; static lifetime, the timeline keeps the pointer
  int32_t layer = -1;   // first layer touched; -1: outside the layers (embedding, head)
  int32_t last_layer = -1;  // last layer touched; equals `layer` unless steps were merged
  int32_t row_begin = 0;    // rows [row_begin, row_end) of the prompt
  int32_t row_end = 0;
  double predicted_s = 0.0;  // predicted time, seconds
};

// The ordered segments of one run, with everything they read and write.
//
// Threads: built on any thread; after its run was dispatched only the executor's thread calls
// execute(). size() and label() must be constant and safe from any thread. The destructor runs on
// whichever thread drops the last reference to the run.
class Program {
 public:
  virtual ~Program() = default;

  // Number of segments; must not change.
  virtual size_t size() const = 0;

  // Label of segment i < size(). Called by the executor once per segment: cheap, no allocation.
  virtual SegmentLabel label(size_t i) const = 0;

  // Does segment i (CPU), or launches it (CUDA). The executor calls i = 0, 1, 2, ... each exactly
  // once, with other runs' segments in between at any place. Throws on failure: the run ends as
  // failed and nothing of it is called again but the destructor.
  virtual void execute(size_t i, const ExecutionContext& context) = 0;

  // Bytes of activations that must outlive boundary `cursor` (before segment `cursor`) if the
  // run is suspended there. 0: nothing, or not known.
  virtual size_t live_bytes(size_t cursor) const {
    (void)cursor;
    return 0;
  }

  // Gives back memory whose content is dead at boundary `cursor`. The executor's thread calls it
  // when the run is suspended there, once the device has drained. Cost: microseconds; it delays the
  // urgent run.
  virtual void give_back_dead(size_t cursor) { (void)cursor; }
};

}  // namespace flowprefill
