// Launch of the attention kernel, one instance per head size. Declared in kernels.h.
#include "devices/cuda/kernels/attention_body.h"
#include "devices/cuda/kernels/kernels.h"

namespace flowprefill {
namespace {

constexpr int kThreads = kAttentionEntries / 16 * 32;
constexpr size_t kFreeSharedBytes = 48 * 1024;  // more have to be asked for

extern __shared__ unsigned char shared_memory[];

template <int kDim>
__global__ void __launch_bounds__(kThreads) attention_kernel(AttentionArgs args) {
  attention_body<kDim>(DeviceThread(shared_memory), args);
}

template <int kDim>
cudaError_t launch(const AttentionArgs& args, cudaStream_t stream) {
  const size_t shared_bytes = attention_shared_bytes(kDim);
  if (shared_bytes > kFreeSharedBytes) {
    const cudaError_t code =
        cudaFuncSetAttribute(attention_kernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (code != cudaSuccess)
      return code;
  }
  const dim3 blocks(static_cast<unsigned>(args.num_tiles),
                    static_cast<unsigned>(args.kv_end - args.kv_begin));
  attention_kernel<kDim><<<blocks, kThreads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
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
