// Launches of the FP8 kernels: one block per row. Declared in kernels.h.
#include "devices/cuda/kernels/fp8_bodies.h"
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/kernels/row_grid.h"

namespace flowprefill {
namespace {

constexpr int kQuantiseThreads = 256;

extern __shared__ unsigned char shared_memory[];

__global__ void __launch_bounds__(kQuantiseThreads) quantise_kernel(QuantiseArgs args) {
  quantise_body(DeviceThread(shared_memory), args);
}
__global__ void __launch_bounds__(kColumnThreads) widen_kernel(WidenArgs args) {
  widen_body(DeviceThread(nullptr), args);
}
__global__ void __launch_bounds__(kColumnThreads) rescale_kernel(RescaleArgs args) {
  rescale_body(DeviceThread(nullptr), args);
}

}  // namespace

cudaError_t launch_quantise(const QuantiseArgs& args, cudaStream_t stream) {
  check(args);
  constexpr size_t kShared = sizeof(float) * kQuantiseThreads / 32;
  quantise_kernel<<<row_grid(args.rows), kQuantiseThreads, kShared, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_widen(const WidenArgs& args, cudaStream_t stream) {
  check(args);
  const dim3 blocks = row_grid(args.rows, column_parts(args.width));
  widen_kernel<<<blocks, kColumnThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

cudaError_t launch_rescale(const RescaleArgs& args, cudaStream_t stream) {
  check(args);
  const dim3 blocks = row_grid(args.rows, column_parts(args.width()));
  rescale_kernel<<<blocks, kColumnThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace flowprefill
