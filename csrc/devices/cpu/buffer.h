// Buffer: page-aligned, zero-filled, lazily committed memory from the kernel; BufferPool: buffers
// that are used again. Used for weights, KV cache and workspaces; all sizes in bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "runtime/thread_annotations.h"

namespace flowprefill {

// Room for so many elements from the start of a cache line on: outputs that lie across two lines
// cost a fifth of the time.
template <typename E>
E* line_of(std::vector<E>& memory, size_t elements) {
  constexpr size_t kLine = 64 / sizeof(E);
  memory.resize(std::max(memory.size(), elements + kLine));
  const size_t at = reinterpret_cast<uintptr_t>(memory.data()) / sizeof(E);
  return memory.data() + (kLine - at % kLine) % kLine;
}

class Buffer {
 public:
  Buffer() = default;
  // Maps `bytes` of zeros (huge pages where the kernel grants them). Throws std::bad_alloc.
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() {
    return static_cast<T*>(memory_);
  }
  template <typename T>
  const T* as() const {
    return static_cast<const T*>(memory_);
  }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(memory_, other.memory_);
    std::swap(bytes_, other.bytes_);
  }
  void* memory_ = nullptr;
  size_t bytes_ = 0;
};

// Keeps buffers for the next run: fresh memory from the kernel costs more time than a short
// prompt's operators (every page is cleared at its first touch). Thread: any.
class BufferPool {
 public:
  // `kept_bytes`: most memory kept for later.
  explicit BufferPool(size_t kept_bytes) : limit_(kept_bytes) {}

  // Returns a buffer of at least `bytes`, content undefined. Throws std::bad_alloc.
  Buffer take(size_t bytes);
  // Takes a buffer back.
  void give(Buffer buffer);

 private:
  const size_t limit_;
  Mutex mutex_;
  std::map<size_t, std::vector<Buffer>> kept_ FP_GUARDED_BY(mutex_);  // by size
  size_t kept_bytes_ FP_GUARDED_BY(mutex_) = 0;
};

}  // namespace flowprefill
