// Buffer: 64-byte aligned, zero-filled, lazily committed memory from the kernel. Used for weights, KV cache
// and workspaces; all sizes in bytes.
#pragma once

#include <cstddef>
#include <utility>

namespace flowprefill {

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

}  // namespace flowprefill
