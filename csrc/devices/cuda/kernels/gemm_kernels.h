// The kernels behind launch_gemm(), those of CUTLASS with one function per tile and output type.
// Defined in gemm_few_rows.cu, gemm_sm80.cu, gemm_sm90.cu and gemm_gated_sm80.cu, called by gemm.cc
// only.
#pragma once

#include <cuda_runtime_api.h>

#include "devices/cuda/kernels/gemm_args.h"

namespace flowprefill {

// Each launches on `stream` and returns what the launch returned; args are already checked.
template <typename Output>  // float or Bf16
cudaError_t gemm_ampere_64x64(const GemmArgs& args, cudaStream_t stream);
template <typename Output>
cudaError_t gemm_ampere_128x128(const GemmArgs& args, cudaStream_t stream);
template <typename Output>
cudaError_t gemm_ampere_256x128(const GemmArgs& args, cudaStream_t stream);
template <typename Output>
cudaError_t gemm_hopper_128x256(const GemmArgs& args, cudaStream_t stream);

// Every epilogue; at most kMostFewRows rows.
cudaError_t gemm_few_rows(const GemmArgs& args, cudaStream_t stream);

// args.is_gated, bf16 output.
cudaError_t gemm_gated_ampere_64x64(const GemmArgs& args, cudaStream_t stream);
cudaError_t gemm_gated_ampere_128x128(const GemmArgs& args, cudaStream_t stream);
cudaError_t gemm_gated_ampere_256x128(const GemmArgs& args, cudaStream_t stream);

}  // namespace flowprefill
