// LanePool: the static activation buffers graphs are captured against, and who is in them. Tenant:
// one program's place. Called by CudaProgram on the executor's thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <span>
#include <vector>

#include "devices/cuda/runtime/memory.h"
#include "graph/live_set.h"
#include "runtime/thread_annotations.h"

namespace flowprefill {

struct LaneOptions {
  int32_t num_lanes = 2;
  size_t lane_bytes = 0;     // activations of the largest plan
  size_t input_bytes = 0;    // tokens, positions, block tables, lengths of the largest run
  size_t scratch_bytes = 0;  // the largest segment's; one for all lanes: dead at every boundary
  size_t device_spill_bytes = size_t{1}
                              << 30;  // of suspended runs; beyond it they go to pinned memory
};

// Where a segment finds its memory on the device.
struct LaneView {
  int32_t index = 0;
  std::byte* activations = nullptr;
  std::byte* inputs = nullptr;
  std::byte* scratch = nullptr;
};

struct LaneReport {
  uint64_t num_spills = 0;
  uint64_t num_restores = 0;
  uint64_t spilled_bytes = 0;  // copied, all in all
  uint64_t restored_bytes = 0;
  size_t device_spill_bytes = 0;  // held now
  size_t pinned_spill_bytes = 0;
};

// Live activations of a run without a lane: the ranges of `live`, one after another.
struct Spill {
  const LiveSet* live = nullptr;  // of the tenant; not to be used once that has ended
  size_t bytes = 0;
  void* device = nullptr;  // either here
  PinnedBlock pinned;      // or here
};

class LanePool;

// Not in a lane until LanePool::enter(). The destructor, on any thread, gives lane and spill back.
class Tenant {
 public:
  // `inputs` are copied into the lane whenever one is taken, so they are never spilled; the caller
  // keeps them. Throws std::invalid_argument if they are larger than the lanes' input area.
  Tenant(LanePool& pool, std::span<const std::byte> inputs);
  ~Tenant();
  Tenant(const Tenant&) = delete;
  Tenant& operator=(const Tenant&) = delete;

  // What has to survive if the lane is needed now; the set must outlive the tenant.
  void keep(const LiveSet* live) { live_ = live; }
  bool has_lane() const { return lane_ >= 0; }

 private:
  friend class LanePool;

  LanePool& pool_;
  const std::span<const std::byte> inputs_;
  // Written by the executor's thread, under the pool's mutex.
  int32_t lane_ = -1;
  const LiveSet* live_ = nullptr;
  std::list<Spill> spill_;  // at most one; a list, so that it can be handed over without memory
};

// A run that starts takes a free lane. If all are taken, the tenant that entered its lane longest
// ago (as urgent runs pass each other it is likely to come back last) is spilled: its live bytes,
// nothing else, are copied aside in stream order, and copied back, perhaps into another lane, when
// it goes on. No step of this waits for the device.
//
// The executor lets nothing in flight when a run leaves the device, so a tenant that is in a lane
// but not running has its activations complete there, and no kernel uses what was freed by then.
class LanePool {
 public:
  // Throws std::invalid_argument for num_lanes < 1, CudaError.
  LanePool(int device, LaneOptions options, PinnedPool& pinned);
  // The stream given to enter() must have nothing in flight, and must still exist.
  ~LanePool();
  LanePool(const LanePool&) = delete;
  LanePool& operator=(const LanePool&) = delete;

  // Takes and gives back the memory of one spill, so that the first one, in the midst of a
  // preemption, finds it in its pool: of the device up to device_spill_bytes, pinned where the
  // device has none. Before the first enter(). Throws CudaError.
  void prepare(cudaStream_t stream);

  // The tenant's lane, taken now if it has none. If it throws the tenant has no lane, and every
  // other tenant's state is as it was or properly spilled. Cost when it has one: nothing.
  const LaneView& enter(Tenant& tenant, cudaStream_t stream, const CallContext& context);

  // Frees the tenant's lane and forgets its activations; work in flight may still use them.
  void leave(Tenant& tenant) noexcept;

  const LaneOptions& options() const { return options_; }
  std::vector<LaneView> views() const;  // of all lanes, by index
  LaneReport report() const;            // any thread

 private:
  friend class Tenant;
  struct Lane {
    LaneView view;
    DeviceBuffer activations;
    DeviceBuffer inputs;
    PinnedBlock staging;  // where inputs are copied from
    Tenant* tenant = nullptr;
    uint64_t entered = 0;  // tick_ then
  };

  Lane& free_lane(cudaStream_t stream, const CallContext& context) FP_REQUIRES(mutex_);
  void spill(Lane& lane, cudaStream_t stream, const CallContext& context) FP_REQUIRES(mutex_);
  void restore(Tenant& tenant, Lane& lane, cudaStream_t stream, const CallContext& context)
      FP_REQUIRES(mutex_);
  Spill take_storage(const LiveSet& live, cudaStream_t stream, const CallContext& context)
      FP_REQUIRES(mutex_);
  void empty_garbage(cudaStream_t stream) FP_REQUIRES(mutex_);
  void forget(Tenant& tenant) noexcept;

  const LaneOptions options_;
  PinnedPool& pinned_;
  SpillPool spill_pool_;
  DeviceBuffer scratch_;
  std::vector<Lane> lanes_;

  mutable Mutex mutex_;  // held for a few launches at most
  uint64_t tick_ FP_GUARDED_BY(mutex_) = 0;
  cudaStream_t stream_ FP_GUARDED_BY(mutex_) = nullptr;  // of the last enter()
  // Of tenants that ended while spilled, or after their restore.
  std::list<Spill> garbage_ FP_GUARDED_BY(mutex_);
  LaneReport report_ FP_GUARDED_BY(mutex_);
};

}  // namespace flowprefill
