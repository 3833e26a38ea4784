// bf16 GEMMs of CUTLASS for compute capability 8.0 and later (mma.sync) whose epilogue is a gate: b
// has gate and up in alternating rows. Called through gemm.cc. Compiled for every architecture we
// ship.
#include "devices/cuda/kernels/cutlass_launch.h"
#include "devices/cuda/kernels/gemm_gated_tiles.h"
#include "devices/cuda/kernels/gemm_kernels.h"

namespace flowprefill {

cudaError_t gemm_gated_ampere_64x64(const GemmArgs& args, cudaStream_t stream) {
  return launch_cutlass<Gated64x64>(args, stream);
}
cudaError_t gemm_gated_ampere_128x128(const GemmArgs& args, cudaStream_t stream) {
  return launch_cutlass<Gated128x128>(args, stream);
}
cudaError_t gemm_gated_ampere_256x128(const GemmArgs& args, cudaStream_t stream) {
  return launch_cutlass<Gated256x128>(args, stream);
}

}  // namespace flowprefill
