// CudaDevice: the executor's device with run-ahead: launches segments on one stream, bounds how
// many are in flight by events, finds asynchronous errors and measures each segment. Owned by the
// Executor.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "devices/cuda/runtime/cuda_resources.h"
#include "devices/cuda/runtime/device_clock.h"
#include "devices/cuda/runtime/stream_event.h"
#include "runtime/device.h"

namespace flowprefill {

struct CudaDeviceOptions {
  // Segments in flight after throttle(), 1 to 4. Blocking time is at most run_ahead + 1 segments.
  // 1 hides launches that are shorter than a segment, more than 1 those that are longer.
  int run_ahead = 1;
  // With run_ahead 1: whether throttle() keeps the next launch back until shortly before the
  // segment that executes is expected to end. So a dispatch mostly finds one segment in flight, not
  // two.
  bool launches_late = false;
  // Waits ask whether a segment has ended, instead of sleeping until it has, around the time when
  // it is expected to, and for this long at least: waking up costs 40 to 85 us. 0: never; a segment
  // that came behind another then counts from that one's end, even if it was launched later.
  double spin_s = 50e-6;
  // So long the first launch into an idle stream relies on the last host time of an event.
  double anchor_s = 1;
  // Called at the end of attach(), on the executor's thread: capture ahead, make library handles.
  std::function<void()> prepare = {};
};

// Errors: a call that fails ends the run that made it. What fails on the device is found by a later
// call, mostly the wait for the oldest segment in flight, and is charged to that one: it was this
// segment or one of the run_ahead in flight with it (run_ahead = 1 and CUDA_LAUNCH_BLOCKING=1 say
// which). After any failure drain() waits for the whole stream, once. A device beyond use (an
// illegal address) fails every later run and nothing else.
class CudaDevice final : public Device {
 public:
  static constexpr int kMaxRunAhead = 4;

  // Throws std::invalid_argument for run_ahead outside 1..4, a negative spin_s, an anchor_s
  // that is not above 0, or no resources.
  CudaDevice(std::shared_ptr<CudaResources> resources, CudaDeviceOptions options);

  // Sets the thread's device and its capture mode to relaxed: the queries of this thread then never
  // break a capture of another thread, such as torch's.
  void attach() override;
  void detach() noexcept override;
  void launch(Program& program, size_t i) override;
  void throttle() override;
  void drain() override;

  bool has_segment_times() const override { return true; }
  bool take_segment_time(SegmentTime& time) override;

 private:
  struct Slot {
    StreamEvent start;
    StreamEvent end;
    bool has_start = false;  // else it started when the one before it ended
    CallContext context;
    int64_t launched_ns = 0;
    double predicted_ns = 0;
  };

  Slot& slot(size_t i) { return slots_[i % slots_.size()]; }
  int64_t spin_ns() const { return static_cast<int64_t>(options_.spin_s * 1e9); }
  bool is_idle();
  void launch_into(Slot& slot, Program& program, size_t i);
  void wait_oldest();
  SegmentTime time_of(const Slot& done);
  void learn(const Slot& done, const SegmentTime& time);
  int64_t expected_end_ns(const Slot& oldest, double share) const;
  void hold_next_launch();
  void wait_for(const Slot& oldest) const;

  const std::shared_ptr<CudaResources> resources_;
  const CudaDeviceOptions options_;
  cudaStreamCaptureMode previous_mode_ = cudaStreamCaptureModeGlobal;

  // Launch n is in slots_[n % size]. One more than can be in flight: the clock's reference is the
  // one completed last.
  std::vector<Slot> slots_;
  std::unique_ptr<DeviceClock> clock_;
  size_t num_launched_ = 0;
  size_t num_done_ = 0;
  int64_t last_end_ns_ = 0;  // of the segment completed last
  double slowness_ = 1;      // of the latest segments, by what was predicted for them
  bool is_broken_ = false;   // something failed since the stream was last known to be idle

  // Times that the executor has yet to take; it does after each throttle() and drain().
  std::array<SegmentTime, kMaxRunAhead + 2> times_;
  size_t num_times_ = 0;
};

}  // namespace flowprefill
