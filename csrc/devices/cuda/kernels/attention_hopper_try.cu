// To be deleted: other kernels of heads of 128.
#include "devices/cuda/kernels/attention_hopper.cuh"

namespace flowprefill {

cudaError_t attention_hopper_try(int variant, const AttentionArgs& args, cudaStream_t stream) {
  switch (variant) {
    case 1:
      return Hopper<128, false, GatherLoads<128, false, false>>::launch(args, stream);
    case 3:
      return Hopper<128, false, BoxLoads<128, false, false, 96>>::launch(args, stream);
    case 4:
      return Hopper<128, false, BoxLoads<128, false, false, 112>>::launch(args, stream);
    case 5:
      return Hopper<128, false, BoxLoads<128, false, false, 160>>::launch(args, stream);
    case 6:
      return Hopper<128, false, BoxLoads<128, false, false, 176>>::launch(args, stream);
    default:
      return Hopper<128, false, BoxLoads<128, false, false, 128, 3>>::launch(args, stream);
  }
}

}  // namespace flowprefill
