// Attention of heads of 128 on compute capability 9.0. Called through attention_hopper.cc.
#include "devices/cuda/kernels/attention_hopper.cuh"

namespace flowprefill {

cudaError_t attention_hopper_128(const AttentionArgs& args, cudaStream_t stream) {
  return launch_hopper<128>(args, stream);
}

}  // namespace flowprefill
