// launch_attention_hopper(): from the head size to its kernel. Declared in kernels.h.
#include "devices/cuda/kernels/attention_hopper.h"

#include <cstdlib>
#include <string_view>

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
      if (const char* name = std::getenv("FLOWPREFILL_HOPPER");
          name && args.window == 0 && args.softcap == 0) {
        for (int i = 0; i < 8; ++i) {
          if (std::string_view(name) == kHopperVariants[i] && i != 2)
            return i == 0 ? attention_hopper_old(args, stream)
                          : attention_hopper_try(i, args, stream);
        }
      }
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
