#include "devices/cuda/runtime/cuda_device.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/clock.h"

namespace flowprefill {

namespace {

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

void CudaDevice::launch_into(Slot& slot, Program& program, size_t i) {
  if (num_launched_ == num_done_ && clock_->is_stale())
    clock_->anchor(resources_->stream(), slot.context, spin_ns());
  slot.start.record(resources_->stream(), slot.context);
  program.execute(i, {});
  slot.end.record(resources_->stream(), slot.context);
}

void CudaDevice::throttle() {
  while (num_launched_ - num_done_ > static_cast<size_t>(options_.run_ahead))
    wait_oldest();
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
    wait_for(oldest.end, oldest.context);
    const int64_t start_ns = clock_->time_of(oldest.start, oldest.context);
    times_[num_times_] = {start_ns, clock_->advance_to(oldest.end, oldest.context)};
  } catch (...) {
    is_broken_ = true;
    throw;
  }
  num_times_ = std::min(num_times_ + 1, times_.size() - 1);
  ++num_done_;
}

void CudaDevice::wait_for(const StreamEvent& event, const CallContext& context) const {
  if (options_.spin_s > 0) {
    const int64_t until_ns = now_ns() + spin_ns();
    do {
      if (event.is_done(context))
        return;
    } while (now_ns() < until_ns);
  }
  event.wait(context);
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
