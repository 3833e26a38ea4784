// The kernels behind launch_attention_hopper(), one function per head size. Defined in
// attention_hopper_*.cu, called by attention_hopper.cc only.
#pragma once

#include <cuda_runtime_api.h>

#include "devices/cuda/kernels/attention_args.h"

namespace flowprefill {

// Each launches on `stream` and returns what the launch returned; args are already checked.
cudaError_t attention_hopper_64(const AttentionArgs& args, cudaStream_t stream);
cudaError_t attention_hopper_128(const AttentionArgs& args, cudaStream_t stream);
cudaError_t attention_hopper_256(const AttentionArgs& args, cudaStream_t stream);

}  // namespace flowprefill
