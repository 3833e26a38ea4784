// launch_score(): one block per row. launch_pool(): one thread per column. Declared in kernels.h.
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/kernels/score_body.h"

namespace flowprefill {
namespace {

constexpr int kScoreThreads = 1024;
constexpr int kPoolThreads = 64;  // few, so that there are many blocks

extern __shared__ unsigned char shared_memory[];

__global__ void __launch_bounds__(kScoreThreads) score_kernel(ScoreArgs args) {
  score_body(DeviceThread(shared_memory), args);
}
__global__ void __launch_bounds__(kPoolThreads) pool_kernel(PoolArgs args) {
  pool_body(DeviceThread(nullptr), args);
}

}  // namespace

cudaError_t launch_score(const ScoreArgs& args, cudaStream_t stream) {
  check(args);
  score_kernel<<<static_cast<unsigned>(args.rows), kScoreThreads, score_shared_bytes(kScoreThreads),
                 stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_pool(const PoolArgs& args, cudaStream_t stream) {
  check(args);
  const int32_t blocks = (args.width + kPoolThreads - 1) / kPoolThreads;
  pool_kernel<<<static_cast<unsigned>(blocks), kPoolThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace flowprefill
