// The CUTLASS kernels of gemm_gated_sm80.cu as types: tiles, main loop, epilogue. Used there, and
// by a host test that runs their epilogues.
#pragma once

#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>

#include <cutlass/epilogue/threadblock/fusion/visitors.hpp>

#include "cuda/kernels/gemm_gated_store.h"

namespace flowprefill {

template <typename BlockShape, typename WarpShape, int kStages>
struct GatedTile {
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
};

// The same as those of gemm_sm80.cu.
using Gated64x64 =
    GatedTile<cutlass::gemm::GemmShape<64, 64, 64>, cutlass::gemm::GemmShape<32, 32, 64>, 4>;
using Gated128x128 =
    GatedTile<cutlass::gemm::GemmShape<128, 128, 32>, cutlass::gemm::GemmShape<64, 64, 32>, 4>;
using Gated256x128 =
    GatedTile<cutlass::gemm::GemmShape<256, 128, 32>, cutlass::gemm::GemmShape<64, 64, 32>, 3>;

}  // namespace flowprefill
