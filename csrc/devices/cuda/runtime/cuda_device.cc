#include "devices/cuda/runtime/cuda_device.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "runtime/clock.h"

namespace flowprefill {

namespace {

// A launch that is kept back comes so long before the end of the segment that executes: the time
// that launching takes, and a share of that segment for what was predicted wrongly.
constexpr int64_t kLeadNs = 60'000;
constexpr double kLeadShare = 0.15;

constexpr double kLearning = 0.1;       // weight of a segment in slowness_
constexpr double kLeastLearntNs = 5e4;  // shorter segments tell of launches

// Waits are slept but for the last of them, in pieces, since a segment may end earlier than
// expected; and it is asked for a while after it should have ended.
constexpr int64_t kPieceNs = 100'000;
constexpr int64_t kWakingNs = 80'000;
constexpr int64_t kLateNs = 150'000;

// One piece of a wait of left_ns, or nothing where too little is left.
void doze(int64_t left_ns) {
  if (left_ns > kWakingNs)
    std::this_thread::sleep_for(std::chrono::nanoseconds(std::min(left_ns - kWakingNs, kPieceNs)));
}

CudaDeviceOptions checked(CudaDeviceOptions options) {
  if (options.run_ahead < 1 || options.run_ahead > CudaDevice::kMaxRunAhead) {
    throw std::invalid_argument("run_ahead: got " + std::to_string(options.run_ahead) +
                                ", expected 1 to " + std::to_string(CudaDevice::kMaxRunAhead));
  }
  if (!(options.spin_s >= 0)) {
    throw std::invalid_argument("spin_s: got " + std::to_string(options.spin_s) +
                                ", expected 0 or more seconds");
  }
  if (!(options.anchor_s > 0)) {
    throw std::invalid_argument("anchor_s: got " + std::to_string(options.anchor_s) +
                                ", expected more than 0 seconds");
  }
  return options;
}

std::shared_ptr<CudaResources> checked(std::shared_ptr<CudaResources> resources) {
  if (resources == nullptr)
    throw std::invalid_argument("resources: got none");
  return resources;
}

}  // namespace

CudaDevice::CudaDevice(std::shared_ptr<CudaResources> resources, CudaDeviceOptions options)
    : resources_(checked(std::move(resources))), options_(checked(std::move(options))) {}

void CudaDevice::attach() {
  FP_CUDA(cudaSetDevice(resources_->device()));
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  FP_CUDA(cudaThreadExchangeStreamCaptureMode(&mode));
  previous_mode_ = mode;
  try {
    slots_.resize(static_cast<size_t>(options_.run_ahead) + 2);
    for (Slot& slot : slots_) {
      slot.start = StreamEvent::make();
      slot.end = StreamEvent::make();
    }
    clock_ = std::make_unique<DeviceClock>(static_cast<int64_t>(options_.anchor_s * 1e9));
    if (options_.prepare)
      options_.prepare();
  } catch (...) {
    detach();
    throw;
  }
}

void CudaDevice::detach() noexcept {
  clock_.reset();
  slots_.clear();
  ignore(cudaThreadExchangeStreamCaptureMode(&previous_mode_));
}

void CudaDevice::launch(Program& program, size_t i) {
  if (is_broken_)
    drain();
  Slot& next = slot(num_launched_);
  const SegmentLabel label = program.label(i);
  next.context = {.op = label.op, .layer = label.layer};
  next.predicted_ns = label.predicted_s * 1e9;
  try {
    launch_into(next, program, i);
  } catch (const CudaError& error) {
    is_broken_ = true;
    throw error.charged_to(next.context);
  } catch (...) {
    is_broken_ = true;
    throw;
  }
  ++num_launched_;
}

// Whether nothing executes; without spin_s, whether nothing is in flight.
bool CudaDevice::is_idle() {
  if (num_launched_ == num_done_)
    return true;
  const Slot& latest = slot(num_launched_ - 1);
  return options_.spin_s > 0 && latest.end.is_done(latest.context);
}

// An event between two kernels costs some microseconds in which neither runs. So a segment that
// comes behind another has none for its start.
void CudaDevice::launch_into(Slot& slot, Program& program, size_t i) {
  if (num_launched_ == num_done_ && clock_->is_stale())
    clock_->anchor(resources_->stream(), slot.context, spin_ns());
  slot.has_start = is_idle();
  if (slot.has_start)
    slot.start.record(resources_->stream(), slot.context);
  slot.launched_ns = now_ns();
  program.execute(i, {});
  slot.end.record(resources_->stream(), slot.context);
}

void CudaDevice::throttle() {
  while (num_launched_ - num_done_ > static_cast<size_t>(options_.run_ahead))
    wait_oldest();
  if (options_.launches_late && options_.run_ahead == 1 && num_launched_ - num_done_ == 1)
    hold_next_launch();
}

// When the oldest segment in flight is expected to end, `share` of its time from now on.
int64_t CudaDevice::expected_end_ns(const Slot& oldest, double share) const {
  return std::max(oldest.launched_ns, last_end_ns_) +
         static_cast<int64_t>(oldest.predicted_ns * slowness_ * share);
}

// Mail that comes meanwhile loses nothing: the executor would wait for this segment anyway.
void CudaDevice::hold_next_launch() {
  const Slot& oldest = slot(num_done_);
  const int64_t until_ns = expected_end_ns(oldest, 1 - kLeadShare) - kLeadNs;
  for (int64_t left_ns = until_ns - now_ns(); left_ns > 0; left_ns = until_ns - now_ns()) {
    if (oldest.end.is_done(oldest.context))
      return;
    doze(left_ns);
  }
}

void CudaDevice::learn(const Slot& done, const SegmentTime& time) {
  last_end_ns_ = time.end_ns;
  if (done.predicted_ns < kLeastLearntNs)
    return;
  const double ratio = static_cast<double>(time.end_ns - time.start_ns) / done.predicted_ns;
  slowness_ += kLearning * (std::clamp(ratio, 0.01, 3.0) - slowness_);
}

// After a failure events tell nothing certain (one may never have been recorded), the stream does.
void CudaDevice::drain() {
  while (!is_broken_ && num_done_ < num_launched_)
    wait_oldest();
  if (!is_broken_)
    return;
  num_done_ = num_launched_;
  resources_->synchronize();
  clock_->forget();
  is_broken_ = false;
}

void CudaDevice::wait_oldest() {
  const Slot& oldest = slot(num_done_);
  try {
    wait_for(oldest);
    times_[num_times_] = time_of(oldest);
    learn(oldest, times_[num_times_]);
  } catch (...) {
    is_broken_ = true;
    throw;
  }
  num_times_ = std::min(num_times_ + 1, times_.size() - 1);
  ++num_done_;
}

SegmentTime CudaDevice::time_of(const Slot& done) {
  const int64_t start_ns =
      done.has_start ? clock_->time_of(done.start, done.context) : last_end_ns_;
  return {start_ns, clock_->advance_to(done.end, done.context)};
}

void CudaDevice::wait_for(const Slot& oldest) const {
  if (options_.spin_s > 0) {
    const int64_t end_ns = expected_end_ns(oldest, 1);
    const int64_t until_ns = std::max(now_ns() + spin_ns(), end_ns + kLateNs);
    for (int64_t now = now_ns(); now < until_ns; now = now_ns()) {
      if (oldest.end.is_done(oldest.context))
        return;
      doze(end_ns - now);
    }
  }
  oldest.end.wait(oldest.context);
}

bool CudaDevice::take_segment_time(SegmentTime& time) {
  if (num_times_ == 0)
    return false;
  time = times_.front();
  std::move(times_.begin() + 1, times_.begin() + static_cast<ptrdiff_t>(num_times_),
            times_.begin());
  --num_times_;
  return true;
}

}  // namespace flowprefill
