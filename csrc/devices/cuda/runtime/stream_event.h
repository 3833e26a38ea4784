// StreamEvent: owner of one CUDA event with a time stamp; marks where a stream is. Used by
// CudaDevice.
#pragma once

#include <cmath>
#include <cstdint>

#include "devices/cuda/runtime/handle.h"

namespace flowprefill {

class StreamEvent : public Handle<cudaEvent_t, cudaEventDestroy> {
 public:
  StreamEvent() = default;

  // An event that keeps its time and whose wait() sleeps instead of spinning. Throws CudaError.
  static StreamEvent make() {
    cudaEvent_t event = nullptr;
    FP_CUDA(cudaEventCreateWithFlags(&event, cudaEventBlockingSync));
    return StreamEvent(event);
  }

  void record(cudaStream_t stream, const CallContext& context = {}) const {
    FP_CUDA(cudaEventRecord(get(), stream), context);
  }

  // Whether the stream has passed it. Throws the device's error if it has one.
  bool is_done(const CallContext& context = {}) const {
    const cudaError_t code = cudaEventQuery(get());
    if (code == cudaErrorNotReady) {
      ignore(code);
      return false;
    }
    check(code, "cudaEventQuery", context);
    return true;
  }

  void wait(const CallContext& context = {}) const {
    FP_CUDA(cudaEventSynchronize(get()), context);
  }

  // Device time from `earlier` to this, nanoseconds; both must be done. CUDA gives a float of
  // milliseconds: exact to 0.1 us up to a second, useless after an hour.
  int64_t ns_since(const StreamEvent& earlier, const CallContext& context = {}) const {
    float elapsed_ms = 0;
    FP_CUDA(cudaEventElapsedTime(&elapsed_ms, earlier.get(), get()), context);
    return std::llround(static_cast<double>(elapsed_ms) * 1e6);
  }

 private:
  using Handle::Handle;
};

}  // namespace flowprefill
