// launch_cutlass(): a CUTLASS kernel of the 2.x kind, as a tile header defines it. Used by
// gemm_sm80.cu and gemm_gated_sm80.cu.
#pragma once

#include <cutlass/gemm/device/gemm_universal_base.h>

#include "devices/cuda/kernels/cutlass_status.h"
#include "devices/cuda/kernels/gemm_args.h"

namespace flowprefill {

template <class Tile>
cudaError_t launch_cutlass(const GemmArgs& args, cudaStream_t stream) {
  cutlass::gemm::device::GemmUniversalBase<typename Tile::Kernel> gemm;
  cutlass::Status status = gemm.initialize(Tile::arguments(args), /*workspace=*/nullptr, stream);
  if (status == cutlass::Status::kSuccess)
    status = gemm.run(stream);
  return cuda_error_of(status);
}

}  // namespace flowprefill
