// launch_sample(): one block per row. Declared in kernels.h.
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/kernels/launch.cuh"
#include "devices/cuda/kernels/sample_body.h"

namespace flowprefill {
namespace {

constexpr int kSampleThreads = 1024;

extern __shared__ __align__(16) unsigned char shared_memory[];

__global__ void __launch_bounds__(kSampleThreads) sample_kernel(SampleArgs args) {
  sample_body(after_predecessor(shared_memory), args);
}

}  // namespace

cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream) {
  check(args);
  return launch_kernel(sample_kernel, static_cast<unsigned>(args.rows), kSampleThreads,
                       sample_shared_bytes(kSampleThreads), stream, args);
}

}  // namespace flowprefill
