// The CUTLASS kernels of gemm_sm80.cu as types, with their arguments: tiles, main loop, epilogue of
// bias, residual add and rounding. Used there, and by a host test that runs them.
#pragma once

#include <cutlass/epilogue/thread/linear_combination_bias_elementwise.h>
#include <cutlass/gemm/kernel/default_gemm_with_broadcast.h>

#include "devices/cuda/kernels/gemm_args.h"

namespace flowprefill {

template <typename Output>
struct CutlassType;
template <>
struct CutlassType<float> {
  using type = float;
};
template <>
struct CutlassType<Bf16> {
  using type = cutlass::bfloat16_t;
};

template <typename OutputType, typename BlockShape, typename WarpShape, int kStages>
struct PlainTile {
  using Output = OutputType;
  using Block = BlockShape;
  using Element = cutlass::bfloat16_t;
  using D = typename CutlassType<Output>::type;
  static constexpr int kAccess = 16 / sizeof(D);  // elements one thread writes at once
  using Epilogue = cutlass::epilogue::thread::LinearCombinationBiasElementwise<
      D, float, float, D, D, kAccess, cutlass::epilogue::thread::Identity<float>,
      cutlass::plus<float>, /*StoreT=*/false, /*ElementVector=*/float>;
  using Kernel = typename cutlass::gemm::kernel::DefaultGemmWithBroadcast<
      Element, cutlass::layout::RowMajor, cutlass::ComplexTransform::kNone, 8, Element,
      cutlass::layout::ColumnMajor, cutlass::ComplexTransform::kNone, 8, D,
      cutlass::layout::RowMajor, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block,
      WarpShape, cutlass::gemm::GemmShape<16, 8, 16>, Epilogue,
      cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages,
      cutlass::arch::OpMultiplyAdd>::GemmKernel;

  static typename Kernel::Arguments arguments(const GemmArgs& args) {
    D* d = reinterpret_cast<D*>(args.first_d<Output>());
    return {cutlass::gemm::GemmUniversalMode::kGemm,
            {args.rows(), args.columns, args.depth},
            /*batch_count=*/1,
            {args.scale, args.adds_to_d ? 1.0f : 0.0f},
            args.first_a(),
            args.b,
            d,
            d,
            const_cast<float*>(args.bias),
            /*ptr_Tensor=*/nullptr,
            0,
            0,
            0,
            0,
            0,
            0,
            args.lda,
            args.ldb,
            args.ldd,
            args.ldd,
            /*ldr=*/0,
            /*ldt=*/0};
  }
};

template <typename Output>
using Plain64x64 = PlainTile<Output, cutlass::gemm::GemmShape<64, 64, 64>,
                             cutlass::gemm::GemmShape<32, 32, 64>, 4>;
template <typename Output>
using Plain128x128 = PlainTile<Output, cutlass::gemm::GemmShape<128, 128, 32>,
                               cutlass::gemm::GemmShape<64, 64, 32>, 4>;
template <typename Output>
using Plain256x128 = PlainTile<Output, cutlass::gemm::GemmShape<256, 128, 32>,
                               cutlass::gemm::GemmShape<64, 64, 32>, 3>;

}  // namespace flowprefill
