// Handle<T, destroy>: move-only owner of one CUDA handle; the base of Stream, StreamEvent, Graph,
// GraphExec.
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "devices/cuda/runtime/cuda_error.h"

namespace flowprefill {

template <typename T, cudaError_t (*kDestroy)(T)>
class Handle {
 public:
  Handle() = default;
  explicit Handle(T handle) : handle_(handle) {}
  Handle(Handle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Handle() {
    if (handle_ != nullptr)
      ignore(kDestroy(handle_));
  }

  T get() const { return handle_; }
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  T handle_ = nullptr;
};

}  // namespace flowprefill
