// Launch of the product of at most 16 rows: decode steps. Called through gemm.cc.
#include "devices/cuda/kernels/gemm_few_rows_body.h"
#include "devices/cuda/kernels/gemm_kernels.h"
#include "devices/cuda/kernels/launch.cuh"

namespace flowprefill {
namespace {

extern __shared__ unsigned char shared_memory[];

// Two blocks on a multiprocessor: one reads on while the other adds its sums.
template <int kTiles, typename Element>
__global__ void __launch_bounds__(kFewRowsThreads, 2) few_rows_kernel(GemmArgs args) {
  few_rows_body<kTiles, Element>(DeviceThread(shared_memory), args);
}

template <int kTiles, typename Element>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((args.columns + kFewRowsColumns - 1) / kFewRowsColumns);
  const cudaError_t code =
      cudaFuncSetAttribute(few_rows_kernel<kTiles, Element>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, kFewRowsSharedBytes);
  if (code != cudaSuccess)
    return code;
  return launch_kernel(few_rows_kernel<kTiles, Element>, blocks, kFewRowsThreads,
                       kFewRowsSharedBytes, stream, args, !args.b_is_made);
}

template <typename Element>
cudaError_t launch_rows(const GemmArgs& args, cudaStream_t stream) {
  return args.rows() <= 8 ? launch<1, Element>(args, stream) : launch<2, Element>(args, stream);
}

}  // namespace

cudaError_t gemm_few_rows(const GemmArgs& args, cudaStream_t stream) {
  return args.is_fp8() ? launch_rows<E4m3>(args, stream) : launch_rows<Bf16>(args, stream);
}

}  // namespace flowprefill
