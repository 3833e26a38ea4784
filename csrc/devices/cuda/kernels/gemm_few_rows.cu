// Launch of the product of at most 16 rows: decode steps. Called through gemm.cc.
#include <algorithm>

#include "devices/cuda/kernels/gemm_few_rows_body.h"
#include "devices/cuda/kernels/gemm_kernels.h"
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/kernels/launch.cuh"

namespace flowprefill {
namespace {

extern __shared__ unsigned char shared_memory[];

template <int kTiles, typename Element, bool kNorms, bool kRopes>
__global__ void __launch_bounds__(kFewRowsThreads, kFewRowsBlocks)
    few_rows_kernel(FusedProduct args) {
  few_rows_body<kTiles, Element, kNorms, kRopes>(beside_predecessor(shared_memory), args);
}

cudaError_t count_multiprocessors(int* out) {
  int device = 0;
  const cudaError_t code = cudaGetDevice(&device);
  if (code != cudaSuccess)
    return code;
  return cudaDeviceGetAttribute(out, cudaDevAttrMultiProcessorCount, device);
}

// As many blocks as the device holds at once; no bit depends on their number.
template <int kTiles, typename Element, bool kNorms = false, bool kRopes = false>
cudaError_t launch(const FusedProduct& args, cudaStream_t stream) {
  using Form = FewRowsForm<kTiles>;
  const auto kernel = few_rows_kernel<kTiles, Element, kNorms, kRopes>;
  const size_t shared_bytes = Form::kSharedBytes + (kNorms ? normed_bytes(args.product) : 0);
  int multiprocessors = 0;
  cudaError_t code = count_multiprocessors(&multiprocessors);
  if (code == cudaSuccess) {
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shared_bytes));
  }
  if (code != cudaSuccess)
    return code;
  const int32_t units = (args.product.columns + Form::kColumns - 1) / Form::kColumns;
  const auto blocks = static_cast<unsigned>(std::min(units, kFewRowsBlocks * multiprocessors));
  return launch_kernel(kernel, blocks, kFewRowsThreads, shared_bytes, stream, args,
                       !args.product.b_is_made);
}

template <typename Element>
cudaError_t launch_rows(const GemmArgs& args, cudaStream_t stream) {
  return args.rows() <= 8 ? launch<1, Element>({args}, stream) : launch<2, Element>({args}, stream);
}

}  // namespace

cudaError_t gemm_few_rows(const GemmArgs& args, cudaStream_t stream) {
  return args.is_fp8() ? launch_rows<E4m3>(args, stream) : launch_rows<Bf16>(args, stream);
}

cudaError_t launch_fused(const FusedProduct& args, cudaStream_t stream) {
  check(args);
  if (args.has_norm() && args.has_rope())
    return launch<1, Bf16, true, true>(args, stream);
  if (args.has_norm())
    return launch<1, Bf16, true, false>(args, stream);
  if (args.has_rope())
    return launch<1, Bf16, false, true>(args, stream);
  return launch<1, Bf16>(args, stream);
}

}  // namespace flowprefill
