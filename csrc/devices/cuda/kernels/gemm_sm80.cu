// bf16 GEMMs of CUTLASS for compute capability 8.0 and later (mma.sync), epilogue: bias, residual
// add, rounding. Called through gemm.cc. Compiled for every architecture we ship.
#include "devices/cuda/kernels/cutlass_launch.h"
#include "devices/cuda/kernels/gemm_kernels.h"
#include "devices/cuda/kernels/gemm_tiles.h"

namespace flowprefill {

template <typename Output>
cudaError_t gemm_ampere_64x64(const GemmArgs& args, cudaStream_t stream) {
  return launch_cutlass<Plain64x64<Output>>(args, stream);
}
template <typename Output>
cudaError_t gemm_ampere_128x128(const GemmArgs& args, cudaStream_t stream) {
  return launch_cutlass<Plain128x128<Output>>(args, stream);
}
template <typename Output>
cudaError_t gemm_ampere_256x128(const GemmArgs& args, cudaStream_t stream) {
  return launch_cutlass<Plain256x128<Output>>(args, stream);
}

template cudaError_t gemm_ampere_64x64<float>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_64x64<Bf16>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_128x128<float>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_128x128<Bf16>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_256x128<float>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_256x128<Bf16>(const GemmArgs&, cudaStream_t);

}  // namespace flowprefill
