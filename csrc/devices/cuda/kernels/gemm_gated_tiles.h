// The CUTLASS kernels of gemm_gated_sm80.cu as types: tiles, main loop, epilogue. Used there, and
// by a host test that runs their epilogues.
#pragma once

#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "devices/cuda/kernels/gemm_args.h"
#include "devices/cuda/kernels/gemm_gated_store.h"

namespace flowprefill {

template <typename BlockShape, typename WarpShape, int kStages>
struct GatedTile {
  using Output = Bf16;
  using Block = BlockShape;
  using Warp = WarpShape;
  using Element = cutlass::bfloat16_t;
  static constexpr int kPiece = 8;  // accumulators of one row that a thread holds together
  using ThreadMap =
      cutlass::epilogue::threadblock::OutputTileThreadLayout<Block, Warp, Element, kPiece>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithVisitor<
      Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 8, Element,
      cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 8, Element,
      cutlass::layout::RowMajor, kPiece, float, float, cutlass::arch::OpClassTensorOp,
      cutlass::arch::Sm80, Block, Warp, cutlass::gemm::GemmShape<16, 8, 16>, GatedStore<ThreadMap>,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
      cutlass::arch::OpMultiplyAdd>::GemmKernel;

  // C and D are unused: the callbacks store.
  static typename Kernel::Arguments arguments(const GemmArgs& args) {
    const GatedOutput out{args.first_d<Bf16>(), args.ldd,     args.bias,
                          args.rows(),          args.columns, args.is_gelu};
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            {args.rows(), args.columns, args.depth},
            /*batch_count=*/1,
            out,
            args.first_a(),
            args.b,
            /*ptr_C=*/nullptr,
            /*ptr_D=*/nullptr,
            0,
            0,
            0,
            0,
            args.lda,
            args.ldb,
            /*ldc=*/int64_t{0},
            /*ldd=*/int64_t{0}};
  }
};

// The same as in gemm_tiles.h.
using Gated64x64 =
    GatedTile<cutlass::gemm::GemmShape<64, 64, 64>, cutlass::gemm::GemmShape<32, 32, 64>, 4>;
using Gated128x128 =
    GatedTile<cutlass::gemm::GemmShape<128, 128, 32>, cutlass::gemm::GemmShape<64, 64, 32>, 4>;
using Gated256x128 =
    GatedTile<cutlass::gemm::GemmShape<256, 128, 32>, cutlass::gemm::GemmShape<64, 64, 32>, 3>;

}  // namespace flowprefill
