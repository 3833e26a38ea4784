// To be deleted: the kernel as it was.
#include "devices/cuda/kernels/attention_hopper.cuh"

namespace flowprefill {

cudaError_t attention_hopper_old(const AttentionArgs& args, cudaStream_t stream) {
  return Hopper<128, false, GatherLoads<128, false, false>>::launch(args, stream);
}

}  // namespace flowprefill
