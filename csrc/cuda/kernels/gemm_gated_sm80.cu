// bf16 GEMMs of CUTLASS for compute capability 8.0 and later (mma.sync) whose epilogue is SwiGLU: b
// has gate and up in alternating rows. Called through gemm.cc. Compiled for every architecture we
// ship.
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include "cuda/kernels/cutlass_status.h"
#include "cuda/kernels/gemm_gated_tiles.h"
#include "cuda/kernels/gemm_kernels.h"

namespace flowprefill {
namespace {

template <class Tile>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<typename Tile::Kernel>;
  const GatedOutput out{args.first_d<Bf16>(), args.ldd, args.bias, args.rows(), args.columns};
  // C and D of the arguments are unused: the callbacks store.
  const typename Gemm::Arguments arguments(
      cutlass::gemm::GemmUniversalMode::kGemm, {args.rows(), args.columns, args.depth},
      /*batch_count=*/1, out, args.first_a(), args.b, /*ptr_C=*/nullptr, /*ptr_D=*/nullptr, 0, 0, 0,
      0, args.lda, args.ldb, /*ldc=*/0, /*ldd=*/0);
  Gemm gemm;
  cutlass::Status status = gemm.initialize(arguments, /*workspace=*/nullptr, stream);
  if (status == cutlass::Status::kSuccess)
    status = gemm.run(stream);
  return cuda_error_of(status);
}

}  // namespace

cudaError_t gemm_gated_ampere_64x64(const GemmArgs& args, cudaStream_t stream) {
  return launch<Gated64x64>(args, stream);
}
cudaError_t gemm_gated_ampere_128x128(const GemmArgs& args, cudaStream_t stream) {
  return launch<Gated128x128>(args, stream);
}
cudaError_t gemm_gated_ampere_256x128(const GemmArgs& args, cudaStream_t stream) {
  return launch<Gated256x128>(args, stream);
}

}  // namespace flowprefill
