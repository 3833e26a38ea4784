#include "devices/cuda/runtime/memory.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <utility>

namespace flowprefill {

namespace {

constexpr size_t kMinPinnedBytes = 4096;

}  // namespace

DeviceBuffer::DeviceBuffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0)
    return;
  void* memory = nullptr;
  FP_CUDA(cudaMalloc(&memory, bytes));
  memory_ = Handle<void*, cudaFree>(memory);
  FP_CUDA(cudaMemset(memory, 0, bytes));
  FP_CUDA(cudaDeviceSynchronize());  // it ran in the default stream, which others do not wait for
}

PinnedBlock::PinnedBlock(PinnedBlock&& other) noexcept
    : pool_(other.pool_), memory_(std::exchange(other.memory_, {})) {}

PinnedBlock& PinnedBlock::operator=(PinnedBlock&& other) noexcept {
  std::swap(pool_, other.pool_);
  std::swap(memory_, other.memory_);
  return *this;
}

PinnedBlock::~PinnedBlock() {
  if (!memory_.empty())
    pool_->give_back(memory_);
}

PinnedPool::~PinnedPool() {
  for (void* memory : all_)
    ignore(cudaFreeHost(memory));
}

PinnedBlock PinnedPool::take(size_t bytes, const CallContext& context) {
  if (bytes == 0)
    return {};
  const size_t size = std::bit_ceil(std::max(bytes, kMinPinnedBytes));
  const MutexLock lock(mutex_);
  std::vector<std::byte*>& free = free_[size];
  if (free.empty()) {
    // Before the memory is there: after that nothing may throw, give_back() neither.
    all_.reserve(all_.size() + 1);
    free.reserve(all_.size() + 1);
    FP_CUDA(cudaSetDevice(device_), context);
    void* memory = nullptr;
    FP_CUDA(cudaHostAlloc(&memory, size, cudaHostAllocPortable), context);
    all_.push_back(memory);
    bytes_ += size;
    free.push_back(static_cast<std::byte*>(memory));
  }
  std::byte* memory = free.back();
  free.pop_back();
  return {this, {memory, size}};
}

void PinnedPool::give_back(std::span<std::byte> memory) noexcept {
  const MutexLock lock(mutex_);
  free_[memory.size()].push_back(memory.data());
}

size_t PinnedPool::bytes() const {
  const MutexLock lock(mutex_);
  return bytes_;
}

SpillPool::SpillPool(int device) {
  cudaMemPoolProps properties = {};
  properties.allocType = cudaMemAllocationTypePinned;  // CUDA's word for ordinary device memory
  properties.location.type = cudaMemLocationTypeDevice;
  properties.location.id = device;
  cudaMemPool_t pool = nullptr;
  FP_CUDA(cudaMemPoolCreate(&pool, &properties));
  pool_ = Handle<cudaMemPool_t, cudaMemPoolDestroy>(pool);
  uint64_t keep_bytes = std::numeric_limits<uint64_t>::max();
  FP_CUDA(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep_bytes));
}

void* SpillPool::take(size_t bytes, cudaStream_t stream, const CallContext& context) {
  void* memory = nullptr;
  FP_CUDA(cudaMallocFromPoolAsync(&memory, bytes, pool_.get(), stream), context);
  return memory;
}

}  // namespace flowprefill
