// bf16 GEMMs of CUTLASS for compute capability 8.0 and later (mma.sync) whose epilogue is SwiGLU: b
// has gate and up in alternating rows. Called through gemm.cc. Compiled for every architecture we
// ship. Tiles and main loop are those of gemm_sm80.cu.
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "cuda/kernels/cutlass_status.h"
#include "cuda/kernels/gemm_gated_store.h"
#include "cuda/kernels/gemm_kernels.h"

namespace flowprefill {
namespace {

using cutlass::gemm::GemmShape;

template <typename Block, typename Warp, int kStages>
struct GatedAmpere {
  using Element = cutlass::bfloat16_t;
  static constexpr int kPiece = 8;  // accumulators of one row that a thread holds together
  using ThreadMap =
      cutlass::epilogue::threadblock::OutputTileThreadLayout<Block, Warp, Element, kPiece>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 8, Element,
      cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 8, Element,
      cutlass::layout::RowMajor, kPiece, float, float, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, Block, Warp, GemmShape<16, 8, 16>, GatedStore<ThreadMap>,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
      cutlass::arch::OpMultiplyAdd>::GemmKernel;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
    const GatedOutput out{args.first_d<Bf16>(), args.ldd, args.bias, args.rows(), args.columns};
    // C and D of the arguments are unused: the callbacks store.
    const typename Gemm::Arguments arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, {args.rows(), args.columns, args.depth},
        /*batch_count=*/1, out, args.first_a(), args.b, /*ptr_C=*/nullptr, /*ptr_D=*/nullptr, 0, 0,
        0, 0, args.lda, args.ldb, /*ldc=*/0, /*ldd=*/0);
    Gemm gemm;
    cutlass::Status status = gemm.initialize(arguments, /*workspace=*/nullptr, stream);
    if (status == cutlass::Status::kSuccess)
      status = gemm.run(stream);
    return cuda_error_of(status);
  }
};

}  // namespace

cudaError_t gemm_gated_ampere_64x64(const GemmArgs& args, cudaStream_t stream) {
  return GatedAmpere<GemmShape<64, 64, 64>, GemmShape<32, 32, 64>, 4>::launch(args, stream);
}
cudaError_t gemm_gated_ampere_128x128(const GemmArgs& args, cudaStream_t stream) {
  return GatedAmpere<GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, 4>::launch(args, stream);
}
cudaError_t gemm_gated_ampere_256x128(const GemmArgs& args, cudaStream_t stream) {
  return GatedAmpere<GemmShape<256, 128, 32>, GemmShape<64, 64, 32>, 3>::launch(args, stream);
}

}  // namespace flowprefill
