// Launch of the attention kernels, one instance per head size. Declared in kernels.h.
#include "devices/cuda/kernels/attention_body.h"
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/kernels/launch.cuh"

namespace flowprefill {
namespace {

constexpr int kThreads = kAttentionEntries / 16 * 32;

extern __shared__ unsigned char shared_memory[];

template <int kDim>
__global__ void __launch_bounds__(kThreads) attention_kernel(AttentionArgs args) {
  attention_body<kDim>(beside_predecessor(shared_memory), args);
}

template <int kDim>
__global__ void __launch_bounds__(kThreads) attention_merge_kernel(AttentionArgs args) {
  attention_merge_body<kDim>(beside_predecessor(shared_memory), args);
}

template <int kDim>
cudaError_t launch(const AttentionArgs& args, cudaStream_t stream) {
  const auto kernel = attention_kernel<kDim>;
  const size_t shared_bytes = attention_shared_bytes(kDim);
  // So that two blocks fit a multiprocessor, which then has less first-level cache.
  cudaError_t code = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared);
  if (code == cudaSuccess)
    code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(shared_bytes));
  if (code != cudaSuccess)
    return code;
  const auto heads = static_cast<unsigned>(args.kv_end - args.kv_begin);
  const dim3 blocks(static_cast<unsigned>(num_blocks_of(args)), heads);
  code = launch_kernel(kernel, blocks, kThreads, shared_bytes, stream, args);
  if (code != cudaSuccess || args.num_merges == 0)
    return code;
  const dim3 merges(static_cast<unsigned>(args.num_merges), heads);
  return launch_kernel(attention_merge_kernel<kDim>, merges, kThreads, 0, stream, args);
}

}  // namespace

cudaError_t launch_attention(const AttentionArgs& args, cudaStream_t stream) {
  check(args);
  switch (args.head_dim) {
    case 64:
      return launch<64>(args, stream);
    case 96:
      return launch<96>(args, stream);
    case 128:
      return launch<128>(args, stream);
    default:
      return launch<256>(args, stream);
  }
}

}  // namespace flowprefill
