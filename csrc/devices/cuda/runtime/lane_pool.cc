#include "devices/cuda/runtime/lane_pool.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace flowprefill {

namespace {

LaneOptions checked(LaneOptions options) {
  if (options.num_lanes < 1) {
    throw std::invalid_argument("num_lanes: got " + std::to_string(options.num_lanes) +
                                ", expected at least 1");
  }
  return options;
}

enum class Direction { kOut, kIn };

// Between the live ranges of a lane and the storage they lie in one after another.
void copy(const Spill& spill, std::byte* lane, Direction direction, cudaStream_t stream,
          const CallContext& context) {
  auto* stored =
      spill.device != nullptr ? static_cast<std::byte*>(spill.device) : spill.pinned.get();
  const bool is_host = spill.device == nullptr;
  for (const LiveRange& range : spill.live->ranges()) {
    if (direction == Direction::kOut) {
      FP_CUDA(cudaMemcpyAsync(stored, lane + range.offset, range.bytes,
                              is_host ? cudaMemcpyDeviceToHost : cudaMemcpyDeviceToDevice, stream),
              context);
    } else {
      FP_CUDA(cudaMemcpyAsync(lane + range.offset, stored, range.bytes,
                              is_host ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToDevice, stream),
              context);
    }
    stored += range.bytes;
  }
}

}  // namespace

Tenant::Tenant(LanePool& pool, std::span<const std::byte> inputs) : pool_(pool), inputs_(inputs) {
  if (inputs.size() > pool.options().input_bytes) {
    throw std::invalid_argument(
        "inputs: got " + std::to_string(inputs.size()) +
        " bytes, expected at most input_bytes = " + std::to_string(pool.options().input_bytes));
  }
}

Tenant::~Tenant() {
  pool_.forget(*this);
}

LanePool::LanePool(int device, LaneOptions options, PinnedPool& pinned)
    : options_(checked(options)),
      pinned_(pinned),
      spill_pool_(device),
      scratch_(options.scratch_bytes) {
  lanes_.reserve(static_cast<size_t>(options.num_lanes));
  for (int32_t i = 0; i < options.num_lanes; ++i) {
    Lane& lane = lanes_.emplace_back(Lane{.view = {},
                                          .activations = DeviceBuffer(options.lane_bytes),
                                          .inputs = DeviceBuffer(options.input_bytes),
                                          .staging = pinned.take(options.input_bytes)});
    lane.view = {i, lane.activations.get(), lane.inputs.get(), scratch_.get()};
  }
}

LanePool::~LanePool() {
  for (const Spill& spill : garbage_) {
    if (spill.device != nullptr)
      SpillPool::give_back(spill.device, stream_);
  }
  if (!garbage_.empty())
    ignore(cudaStreamSynchronize(stream_));
}

void LanePool::prepare(cudaStream_t stream) {
  const MutexLock lock(mutex_);
  stream_ = stream;
  const LiveSet most({{0, std::min(options_.lane_bytes, options_.device_spill_bytes)}});
  if (most.bytes() == 0)
    return;
  garbage_.push_back(take_storage(most, stream, {}));
  empty_garbage(stream);
}

const LaneView& LanePool::enter(Tenant& tenant, cudaStream_t stream, const CallContext& context) {
  if (tenant.has_lane()) [[likely]]
    return lanes_[static_cast<size_t>(tenant.lane_)].view;
  const MutexLock lock(mutex_);
  stream_ = stream;
  empty_garbage(stream);
  Lane& lane = free_lane(stream, context);
  if (!tenant.inputs_.empty()) {
    std::memcpy(lane.staging.get(), tenant.inputs_.data(), tenant.inputs_.size());
    FP_CUDA(cudaMemcpyAsync(lane.view.inputs, lane.staging.get(), tenant.inputs_.size(),
                            cudaMemcpyHostToDevice, stream),
            context);
  }
  if (!tenant.spill_.empty())
    restore(tenant, lane, stream, context);
  lane.tenant = &tenant;
  lane.entered = ++tick_;
  tenant.lane_ = lane.view.index;
  return lane.view;
}

LanePool::Lane& LanePool::free_lane(cudaStream_t stream, const CallContext& context) {
  const auto found = std::ranges::find(lanes_, nullptr, &Lane::tenant);
  if (found != lanes_.end())
    return *found;
  Lane& lane = *std::ranges::min_element(lanes_, {}, &Lane::entered);
  spill(lane, stream, context);
  return lane;
}

void LanePool::spill(Lane& lane, cudaStream_t stream, const CallContext& context) {
  Tenant& victim = *lane.tenant;
  if (const size_t bytes = victim.live_ == nullptr ? 0 : victim.live_->bytes(); bytes > 0) {
    std::list<Spill> storage;
    storage.push_back(take_storage(*victim.live_, stream, context));
    try {
      copy(storage.front(), lane.view.activations, Direction::kOut, stream, context);
    } catch (...) {
      garbage_.splice(garbage_.end(), storage);  // the copies that were launched still use it
      throw;
    }
    victim.spill_.splice(victim.spill_.end(), storage);
    ++report_.num_spills;
    report_.spilled_bytes += bytes;
  }
  victim.lane_ = -1;
  lane.tenant = nullptr;
}

Spill LanePool::take_storage(const LiveSet& live, cudaStream_t stream, const CallContext& context) {
  const size_t bytes = live.bytes();
  Spill spill{.live = &live, .bytes = bytes, .device = nullptr, .pinned = {}};
  if (report_.device_spill_bytes + bytes <= options_.device_spill_bytes) {
    try {
      spill.device = spill_pool_.take(bytes, stream, context);
      report_.device_spill_bytes += bytes;
      return spill;
    } catch (const CudaError& error) {
      if (!error.is_out_of_memory())
        throw;
    }
  }
  spill.pinned = pinned_.take(bytes, context);
  report_.pinned_spill_bytes += bytes;
  return spill;
}

// The storage is freed at the next change of lanes: until then the copies may be in flight.
void LanePool::restore(Tenant& tenant, Lane& lane, cudaStream_t stream,
                       const CallContext& context) {
  const Spill& spill = tenant.spill_.front();
  copy(spill, lane.view.activations, Direction::kIn, stream, context);
  ++report_.num_restores;
  report_.restored_bytes += spill.bytes;
  garbage_.splice(garbage_.end(), tenant.spill_);
}

void LanePool::empty_garbage(cudaStream_t stream) {
  for (const Spill& spill : garbage_) {
    if (spill.device != nullptr) {
      report_.device_spill_bytes -= spill.bytes;
      SpillPool::give_back(spill.device, stream);
    } else {
      report_.pinned_spill_bytes -= spill.bytes;
    }
  }
  garbage_.clear();
}

void LanePool::leave(Tenant& tenant) noexcept {
  forget(tenant);
}

void LanePool::forget(Tenant& tenant) noexcept {
  const MutexLock lock(mutex_);
  if (tenant.lane_ >= 0) {
    lanes_[static_cast<size_t>(tenant.lane_)].tenant = nullptr;
    tenant.lane_ = -1;
  }
  garbage_.splice(garbage_.end(), tenant.spill_);
}

std::vector<LaneView> LanePool::views() const {
  std::vector<LaneView> views;
  views.reserve(lanes_.size());
  for (const Lane& lane : lanes_)
    views.push_back(lane.view);
  return views;
}

LaneReport LanePool::report() const {
  const MutexLock lock(mutex_);
  return report_;
}

}  // namespace flowprefill
