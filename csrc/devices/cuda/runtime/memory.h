// Owners of device and pinned memory: DeviceBuffer, PinnedPool, SpillPool. Used by LanePool and
// CudaProgram.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <vector>

#include "devices/cuda/runtime/handle.h"
#include "runtime/thread_annotations.h"

namespace flowprefill {

// Device memory for as long as the process serves: lanes, scratch. Zeroed at the start.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t bytes);  // 0: none. Throws CudaError.
  DeviceBuffer(DeviceBuffer&&) noexcept = default;
  DeviceBuffer& operator=(DeviceBuffer&&) noexcept = default;

  std::byte* get() const { return static_cast<std::byte*>(memory_.get()); }
  size_t bytes() const { return bytes_; }

 private:
  Handle<void*, cudaFree> memory_;
  size_t bytes_;
};

class PinnedPool;

// A piece of pinned host memory; goes back to its pool. The device must be done with it by then.
class PinnedBlock {
 public:
  PinnedBlock() = default;
  PinnedBlock(PinnedPool* pool, std::span<std::byte> memory) : pool_(pool), memory_(memory) {}
  PinnedBlock(PinnedBlock&& other) noexcept;
  PinnedBlock& operator=(PinnedBlock&& other) noexcept;
  ~PinnedBlock();

  std::byte* get() const { return memory_.data(); }
  size_t bytes() const { return memory_.size(); }
  explicit operator bool() const { return !memory_.empty(); }

 private:
  PinnedPool* pool_ = nullptr;
  std::span<std::byte> memory_;
};

// Pinned memory by sizes of powers of two. Pinning takes milliseconds and may wait for the device,
// so blocks are kept until the pool ends: after the first runs none is pinned any more. Thread:
// any.
class PinnedPool {
 public:
  explicit PinnedPool(int device) : device_(device) {}
  ~PinnedPool();
  PinnedPool(const PinnedPool&) = delete;
  PinnedPool& operator=(const PinnedPool&) = delete;

  // At least `bytes`; 0: an empty block. Throws CudaError. May set the thread's current device.
  PinnedBlock take(size_t bytes, const CallContext& context = {});
  // All that was ever pinned.
  size_t bytes() const;

 private:
  friend class PinnedBlock;
  void give_back(std::span<std::byte> memory) noexcept;

  const int device_;
  mutable Mutex mutex_;
  size_t bytes_ FP_GUARDED_BY(mutex_) = 0;
  std::vector<void*> all_ FP_GUARDED_BY(mutex_);
  // By size; room for all is reserved at take().
  std::map<size_t, std::vector<std::byte*>> free_ FP_GUARDED_BY(mutex_);
};

// Stream-ordered device memory for spilled activations, in a pool of its own: taking and giving
// back need no synchronisation and do not disturb the pool others use. What is freed stays in the
// pool.
class SpillPool {
 public:
  explicit SpillPool(int device);  // throws CudaError

  // Throws CudaError. Both act in the order of `stream`.
  void* take(size_t bytes, cudaStream_t stream, const CallContext& context);
  static void give_back(void* memory, cudaStream_t stream) noexcept {
    ignore(cudaFreeAsync(memory, stream));
  }

 private:
  Handle<cudaMemPool_t, cudaMemPoolDestroy> pool_;
};

}  // namespace flowprefill
