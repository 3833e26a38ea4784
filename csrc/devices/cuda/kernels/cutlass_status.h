// cuda_error_of(): CUTLASS's status as the CUDA error that callers check. Used by gemm_sm*.cu.
#pragma once

#include <cuda_runtime_api.h>
#include <cutlass/cutlass.h>

namespace flowprefill {

// CUTLASS may have taken CUDA's own record of the error already; a failure stays a failure then.
inline cudaError_t cuda_error_of(cutlass::Status status) {
  if (status == cutlass::Status::kSuccess)
    return cudaSuccess;
  const cudaError_t recorded = cudaGetLastError();
  if (recorded != cudaSuccess)
    return recorded;
  return status == cutlass::Status::kErrorInternal ? cudaErrorLaunchFailure : cudaErrorInvalidValue;
}

}  // namespace flowprefill
