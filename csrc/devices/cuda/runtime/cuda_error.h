// CudaError and check(): the one wrapper every CUDA call of this folder goes through.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace flowprefill {

// The operator on whose behalf a call is made; empty: none (set-up, idle).
struct CallContext {
  const char* op = "";  // static lifetime, as SegmentLabel::op
  int32_t layer = -1;
};

// A CUDA call that did not succeed.
class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, std::string call, CallContext context);

  // The same error, charged to `context` unless it names an operator already.
  CudaError charged_to(const CallContext& context) const;

  cudaError_t code() const { return code_; }
  const std::string& call() const { return call_; }  // e.g. cudaGraphLaunch
  const CallContext& context() const { return context_; }
  bool is_out_of_memory() const { return code_ == cudaErrorMemoryAllocation; }

 private:
  cudaError_t code_;
  std::string call_;
  CallContext context_;
};

// Throws CudaError unless `code` is cudaSuccess. `call` is the call's text; its name is kept.
// CUDA's own record of the error is cleared, so that the next check on this thread, ours or
// torch's, does not find it again.
void check(cudaError_t code, const char* call, const CallContext& context = {});

// For destructors, which cannot throw: what destroying reports is an earlier failure, and a device
// that is beyond use says so at the next call. Clears CUDA's record as check() does.
void ignore(cudaError_t code) noexcept;

}  // namespace flowprefill

// FP_CUDA(cudaEventRecord(event, stream)) or FP_CUDA(cudaEventRecord(event, stream), context)
#define FP_CUDA(call, ...) ::flowprefill::check((call), #call __VA_OPT__(, ) __VA_ARGS__)
