// Launch of the product of at most 16 rows: decode steps. Called through gemm.cc.
#include "devices/cuda/kernels/gemm_few_rows_body.h"
#include "devices/cuda/kernels/gemm_kernels.h"

namespace flowprefill {
namespace {

extern __shared__ unsigned char shared_memory[];

// Two blocks on a multiprocessor: one reads on while the other adds its sums.
template <int kTiles>
__global__ void __launch_bounds__(kFewRowsThreads, 2) few_rows_kernel(GemmArgs args) {
  few_rows_body<kTiles>(DeviceThread(shared_memory), args);
}

template <int kTiles>
cudaError_t launch(const GemmArgs& args, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((args.columns + kFewRowsColumns - 1) / kFewRowsColumns);
  const cudaError_t code = cudaFuncSetAttribute(
      few_rows_kernel<kTiles>, cudaFuncAttributeMaxDynamicSharedMemorySize, kFewRowsSharedBytes);
  if (code != cudaSuccess)
    return code;
  few_rows_kernel<kTiles><<<blocks, kFewRowsThreads, kFewRowsSharedBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

cudaError_t gemm_few_rows(const GemmArgs& args, cudaStream_t stream) {
  return args.rows() <= 8 ? launch<1>(args, stream) : launch<2>(args, stream);
}

}  // namespace flowprefill
