// launch_attention_hopper(): from the head size to its kernel. Declared in kernels.h.
#include "devices/cuda/kernels/attention_hopper.h"

#include "devices/cuda/kernels/kernels.h"

namespace flowprefill {

#ifdef FP_FLASHINFER
bool has_hopper_attention() {
  return true;
}

cudaError_t launch_attention_hopper(const AttentionArgs& args, cudaStream_t stream) {
  check_rows(args);
  switch (args.head_dim) {
    case 64:
      return attention_hopper_64(args, stream);
    case 128:
      return attention_hopper_128(args, stream);
    default:
      return attention_hopper_256(args, stream);
  }
}
#else
bool has_hopper_attention() {
  return false;
}

cudaError_t launch_attention_hopper(const AttentionArgs& args, cudaStream_t) {
  check_rows(args);
  return cudaErrorInvalidDeviceFunction;
}
#endif

}  // namespace flowprefill
