// bf16 GEMMs of CUTLASS for compute capability 8.0 and later (mma.sync), epilogue: bias, residual
// add, rounding. Called through gemm.cc. Compiled for every architecture we ship.
#include <cutlass/epilogue/thread/linear_combination_bias_elementwise.h>
#include <cutlass/gemm/device/gemm_universal_with_broadcast.h>

#include "cuda/kernels/cutlass_status.h"
#include "cuda/kernels/gemm_kernels.h"

namespace flowprefill {
namespace {

using cutlass::gemm::GemmShape;

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

template <typename Output, typename Block, typename Warp, int kStages>
struct Ampere {
  using D = typename CutlassType<Output>::type;
  static constexpr int kAccess = 16 / sizeof(D);  // elements one thread writes at once
  using Epilogue = cutlass::epilogue::thread::LinearCombinationBiasElementwise<
      D, float, float, D, D, kAccess, cutlass::epilogue::thread::Identity<float>,
      cutlass::plus<float>, /*StoreT=*/false, /*ElementVector=*/float>;
  using Gemm = cutlass::gemm::device::GemmUniversalWithBroadcast<
      cutlass::bfloat16_t, cutlass::layout::RowMajor, cutlass::bfloat16_t,
      cutlass::layout::ColumnMajor, D, cutlass::layout::RowMajor, float,
      cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, Block, Warp, GemmShape<16, 8, 16>,
      Epilogue, cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<8>, kStages, 8, 8>;

  static cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
    D* d = reinterpret_cast<D*>(args.first_d<Output>());
    const typename Gemm::Arguments arguments(
        cutlass::gemm::GemmUniversalMode::kGemm, {args.rows(), args.columns, args.depth},
        /*batch_count=*/1, {1.0f, args.adds_to_d ? 1.0f : 0.0f}, args.first_a(), args.b, d, d,
        const_cast<float*>(args.bias), /*ptr_Tensor=*/nullptr, 0, 0, 0, 0, 0, 0, args.lda, args.ldb,
        args.ldd, args.ldd, /*ldr=*/0, /*ldt=*/0);
    Gemm gemm;
    cutlass::Status status = gemm.initialize(arguments, /*workspace=*/nullptr, stream);
    if (status == cutlass::Status::kSuccess)
      status = gemm.run(stream);
    return cuda_error_of(status);
  }
};

}  // namespace

template <typename Output>
cudaError_t gemm_ampere_64x64(const GemmArgs& args, cudaStream_t stream) {
  return Ampere<Output, GemmShape<64, 64, 64>, GemmShape<32, 32, 64>, 4>::launch(args, stream);
}
template <typename Output>
cudaError_t gemm_ampere_128x128(const GemmArgs& args, cudaStream_t stream) {
  return Ampere<Output, GemmShape<128, 128, 32>, GemmShape<64, 64, 32>, 4>::launch(args, stream);
}
template <typename Output>
cudaError_t gemm_ampere_256x128(const GemmArgs& args, cudaStream_t stream) {
  return Ampere<Output, GemmShape<256, 128, 32>, GemmShape<64, 64, 32>, 3>::launch(args, stream);
}

template cudaError_t gemm_ampere_64x64<float>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_64x64<Bf16>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_128x128<float>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_128x128<Bf16>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_256x128<float>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_ampere_256x128<Bf16>(const GemmArgs&, cudaStream_t);

}  // namespace flowprefill
