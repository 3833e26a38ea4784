// Stream: owner of one CUDA stream. The device launches on one, the graph cache captures on
// another.
#pragma once

#include "devices/cuda/runtime/handle.h"

namespace flowprefill {

class Stream : public Handle<cudaStream_t, cudaStreamDestroy> {
 public:
  // A stream that does not wait for the legacy default stream, nor that for it. Throws CudaError.
  static Stream make() {
    cudaStream_t stream = nullptr;
    FP_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    return Stream(stream);
  }

  // Waits for everything in it: after errors and at the end only, never per segment.
  void synchronize(const CallContext& context = {}) const {
    FP_CUDA(cudaStreamSynchronize(get()), context);
  }

 private:
  using Handle::Handle;
};

}  // namespace flowprefill
