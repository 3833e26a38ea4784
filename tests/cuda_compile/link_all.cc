// The one source of the library that tests/cuda_compile links: proof that kernels.h and the graph
// layer's headers fit into one translation unit. Never executed.
#include "cuda/graph_cache.h"
#include "cuda/kernels/kernels.h"

namespace flowprefill {

// A whole layer step as a caller writes it: each launch checked with the same wrapper.
__attribute__((visibility("default"))) void launch_some(const RmsNormArgs& norm,
                                                        const GemmArgs& product, GemmTile tile,
                                                        cudaStream_t stream) {
  const CallContext context{.op = "qkv", .layer = 0};
  FP_CUDA(launch_rms_norm(norm, stream), context);
  FP_CUDA(launch_gemm(product, tile, stream), context);
}

}  // namespace flowprefill
