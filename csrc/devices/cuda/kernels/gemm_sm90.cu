// bf16 GEMMs of CUTLASS's collective builder for compute capability 9.0 (TMA, wgmma), with the same
// epilogue as gemm_sm80.cu. Called through gemm.cc. Compiled for sm_90a only. One
// tile: each costs half a minute to compile, and smaller products have gemm_sm80.cu.
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "devices/cuda/kernels/cutlass_status.h"
#include "devices/cuda/kernels/gemm_kernels.h"

namespace flowprefill {
namespace {

using cute::Int;
using cute::Shape;

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

template <typename Output, typename Tile, typename Cluster>
struct Hopper {
  using D = typename CutlassType<Output>::type;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  static constexpr int kAlignment = 16 / sizeof(D);
  using Fusion = cutlass::epilogue::fusion::LinCombPerColBias<D, float, float, D, float>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, D, Row, kAlignment, D, Row,
      kAlignment, cutlass::epilogue::TmaWarpSpecializedCooperative, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, cutlass::bfloat16_t, Row, 8,
      cutlass::bfloat16_t, Column, 8, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel =
      cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static typename Gemm::Arguments arguments(const GemmArgs& args, int num_multiprocessors) {
    D* d = reinterpret_cast<D*>(args.first_d<Output>());
    typename Gemm::Arguments out{cutlass::gemm::GemmUniversalMode::kGemm,
                                 {args.rows(), args.columns, args.depth, 1},
                                 {reinterpret_cast<const cutlass::bfloat16_t*>(args.first_a()),
                                  {args.lda, Int<1>{}, 0},
                                  reinterpret_cast<const cutlass::bfloat16_t*>(args.b),
                                  {args.ldb, Int<1>{}, 0}},
                                 {{}, d, {args.ldd, Int<1>{}, 0}, d, {args.ldd, Int<1>{}, 0}}};
    out.epilogue.thread.alpha = args.scale;
    out.epilogue.thread.beta = args.adds_to_d ? 1.0f : 0.0f;
    out.epilogue.thread.bias_ptr = args.bias;
    out.hw_info.sm_count = num_multiprocessors;
    return out;
  }

  static cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
    int device = 0;
    int num_multiprocessors = 0;
    cudaError_t code = cudaGetDevice(&device);
    if (code == cudaSuccess) {
      code = cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (code != cudaSuccess)
      return code;
    const typename Gemm::Arguments all = arguments(args, num_multiprocessors);
    cutlass::Status status = Gemm::can_implement(all);
    // None of these kernels splits the depth, so none needs a workspace.
    if (status == cutlass::Status::kSuccess && Gemm::get_workspace_size(all) != 0)
      status = cutlass::Status::kErrorWorkspaceNull;
    Gemm gemm;
    if (status == cutlass::Status::kSuccess)
      status = gemm.initialize(all, /*workspace=*/nullptr, stream);
    if (status == cutlass::Status::kSuccess)
      status = gemm.run(stream);
    return cuda_error_of(status);
  }
};

}  // namespace

// Two blocks of a cluster share the tiles of the weights that they both read.
template <typename Output>
cudaError_t gemm_hopper_128x256(const GemmArgs& args, cudaStream_t stream) {
  return Hopper<Output, Shape<Int<128>, Int<256>, Int<64>>, Shape<Int<2>, Int<1>, Int<1>>>::launch(
      args, stream);
}

template cudaError_t gemm_hopper_128x256<float>(const GemmArgs&, cudaStream_t);
template cudaError_t gemm_hopper_128x256<Bf16>(const GemmArgs&, cudaStream_t);

}  // namespace flowprefill
