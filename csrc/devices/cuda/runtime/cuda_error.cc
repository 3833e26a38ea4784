#include "devices/cuda/runtime/cuda_error.h"

#include <algorithm>
#include <utility>

namespace flowprefill {

namespace {

std::string describe(cudaError_t code, const std::string& call, const CallContext& context) {
  std::string text = call + ": " + cudaGetErrorName(code) + " (" +
                     std::to_string(static_cast<int>(code)) + ", " + cudaGetErrorString(code) + ")";
  if (*context.op != '\0') {
    text += " in operator '" + std::string(context.op) + "'";
    if (context.layer >= 0)
      text += " of layer " + std::to_string(context.layer);
  }
  return text;
}

}  // namespace

CudaError::CudaError(cudaError_t code, std::string call, CallContext context)
    : std::runtime_error(describe(code, call, context)),
      code_(code),
      call_(std::move(call)),
      context_(context) {}

CudaError CudaError::charged_to(const CallContext& context) const {
  return *context_.op != '\0' ? *this : CudaError(code_, call_, context);
}

void check(cudaError_t code, const char* call, const CallContext& context) {
  if (code == cudaSuccess) [[likely]]
    return;
  ignore(code);
  std::string name(call);
  name.resize(std::min(name.find('('), name.size()));
  throw CudaError(code, std::move(name), context);
}

void ignore(cudaError_t code) noexcept {
  if (code != cudaSuccess)
    static_cast<void>(cudaGetLastError());
}

}  // namespace flowprefill
