// launch_kernel(): a launch that may overlap the kernel before it (programmatic dependent launch),
// and after_predecessor(), with which such a kernel begins. Used by the .cu files here; the switch
// is in kernels.h.
//
// A kernel launched so may start while the one before it in the stream still runs, once all blocks
// of that one have started. So it waits in every thread, on every path, before it reads what a
// kernel wrote and before it writes anything: what it overwrites may still be read. The wait is for
// the end of the kernel before, which had itself waited for the one before that. A launch without
// the attribute (other libraries' kernels, copies, graphs) waits for all of its predecessor, and is
// waited for, as ever; the first kernel of a captured graph has no predecessor there, so it is an
// ordinary root, and the graph begins when all before it in the stream has ended.
#pragma once

#include <cuda_runtime.h>

#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

// As kernel<<<grid, threads, shared_bytes, stream>>>(args). A kernel launched by this must begin
// with after_predecessor(), or keep the rules above in another way. overlaps: whether it may.
template <typename Args>
cudaError_t launch_kernel(void (*kernel)(Args), dim3 grid, unsigned threads, size_t shared_bytes,
                          cudaStream_t stream, const Args& args, bool overlaps = true) {
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps && overlaps_launches() ? 1 : 0;
  const cudaError_t code = cudaLaunchKernelEx(&config, kernel, args);
  return code == cudaSuccess ? code : cudaGetLastError();  // no later call finds it again
}

// What the device runs of softcap_kernel. Defined in row_kernels.cu, called by launch.cu.
cudaError_t softcap_attributes(cudaFuncAttributes* out);

// The thread, for a body that waits itself: as late as it can, but everywhere.
__device__ __forceinline__ DeviceThread beside_predecessor(unsigned char* shared) {
  const DeviceThread t(shared);
  t.let_successor_start();
  return t;
}

// The thread, once all that earlier kernels wrote is there. `shared`: as DeviceThread has it.
__device__ __forceinline__ DeviceThread after_predecessor(unsigned char* shared) {
  const DeviceThread t = beside_predecessor(shared);
  t.wait_for_predecessor();
  return t;
}

}  // namespace flowprefill
