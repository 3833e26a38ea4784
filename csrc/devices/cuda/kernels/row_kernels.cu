// Launches of the row kernels: one block per row, 128 or 256 threads. Declared in kernels.h.
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/kernels/launch.cuh"
#include "devices/cuda/kernels/rope_body.h"
#include "devices/cuda/kernels/row_bodies.h"
#include "devices/cuda/kernels/row_grid.h"

namespace flowprefill {
namespace {

constexpr int kNormThreads = 256;
constexpr int kRopeWarps = 4;

extern __shared__ unsigned char shared_memory[];

__global__ void __launch_bounds__(kColumnThreads) embed_kernel(EmbedArgs args) {
  embed_body(after_predecessor(nullptr), args);
}
__global__ void __launch_bounds__(kColumnThreads) rotary_kernel(RotaryArgs args) {
  rotary_body(after_predecessor(nullptr), args);
}
template <typename Out>
__global__ void __launch_bounds__(kNormThreads) rms_norm_kernel(RmsNormArgs<Out> args) {
  const DeviceThread t = beside_predecessor(shared_memory);
  bring_norm_weights(t, args);
  t.wait_for_predecessor();
  rms_norm_body(t, args);
}
__global__ void __launch_bounds__(kNormThreads) residual_kernel(ResidualArgs args) {
  residual_body(after_predecessor(shared_memory), args);
}
__global__ void __launch_bounds__(kColumnThreads) round_kernel(RoundArgs args) {
  round_body(after_predecessor(nullptr), args);
}
__global__ void __launch_bounds__(kColumnThreads) softcap_kernel(SoftcapArgs args) {
  softcap_body(after_predecessor(nullptr), args);
}
template <typename In>
__global__ void __launch_bounds__(kRopeWarps * 32) rope_kernel(RopeArgs<In> args) {
  rope_body(beside_predecessor(nullptr), args);
}
template <typename In>
__global__ void __launch_bounds__(kRopeWarps * 32) rope_rows_kernel(RopeArgs<In> args) {
  rope_rows_body(after_predecessor(shared_memory), args);
}
template <typename In>
__global__ void __launch_bounds__(kColumnThreads) gate_kernel(GateArgs<In> args) {
  gate_body(after_predecessor(nullptr), args);
}

}  // namespace

cudaError_t launch_embed(const EmbedArgs& args, cudaStream_t stream) {
  check(args);
  return launch_kernel(embed_kernel, row_grid(args.rows, column_parts(args.width)), kColumnThreads,
                       0, stream, args);
}

cudaError_t launch_rotary(const RotaryArgs& args, cudaStream_t stream) {
  check(args);
  return launch_kernel(rotary_kernel, row_grid(args.rows), kColumnThreads, 0, stream, args);
}

template <typename Out>
cudaError_t launch_rms_norm(const RmsNormArgs<Out>& args, cudaStream_t stream) {
  check(args);
  constexpr size_t kShared = sizeof(float) * kNormThreads / 32;
  return launch_kernel(rms_norm_kernel<Out>, row_grid(args.rows), kNormThreads, kShared, stream,
                       args);
}

cudaError_t launch_residual(const ResidualArgs& args, cudaStream_t stream) {
  check(args);
  constexpr size_t kShared = sizeof(float) * kNormThreads / 32;
  return launch_kernel(residual_kernel, row_grid(args.rows), kNormThreads, kShared, stream, args);
}

cudaError_t launch_round(const RoundArgs& args, cudaStream_t stream) {
  check(args);
  return launch_kernel(round_kernel, row_grid(args.rows, column_parts(args.width)), kColumnThreads,
                       0, stream, args);
}

cudaError_t launch_softcap(const SoftcapArgs& args, cudaStream_t stream) {
  check(args);
  const dim3 blocks = row_grid(args.rows, column_parts(args.width, 4));
  return launch_kernel(softcap_kernel, blocks, kColumnThreads, 0, stream, args);
}

template <typename In>
cudaError_t launch_rope(const RopeArgs<In>& args, cudaStream_t stream) {
  check(args);
  constexpr int kThreads = kRopeWarps * 32;
  if (args.norms_rows) {
    constexpr size_t kShared = sizeof(float) * kRopeWarps;
    return launch_kernel(rope_rows_kernel<In>, row_grid(args.rows, kRopeRowParts), kThreads,
                         kShared, stream, args);
  }
  const int32_t heads = args.heads + 2 * args.kv_heads;
  const int32_t parts = (heads + kRopeWarps - 1) / kRopeWarps;
  return launch_kernel(rope_kernel<In>, row_grid(args.rows, parts), kThreads, 0, stream, args);
}

template <typename In>
cudaError_t launch_gate(const GateArgs<In>& args, cudaStream_t stream) {
  check(args);
  const dim3 blocks = row_grid(args.rows, column_parts(args.width));
  return launch_kernel(gate_kernel<In>, blocks, kColumnThreads, 0, stream, args);
}

template cudaError_t launch_rms_norm<float>(const RmsNormArgs<float>&, cudaStream_t);
template cudaError_t launch_rms_norm<Bf16>(const RmsNormArgs<Bf16>&, cudaStream_t);
template cudaError_t launch_rope<float>(const RopeArgs<float>&, cudaStream_t);
template cudaError_t launch_rope<Bf16>(const RopeArgs<Bf16>&, cudaStream_t);
template cudaError_t launch_gate<float>(const GateArgs<float>&, cudaStream_t);
template cudaError_t launch_gate<Bf16>(const GateArgs<Bf16>&, cudaStream_t);

cudaError_t softcap_attributes(cudaFuncAttributes* out) {
  return cudaFuncGetAttributes(out, softcap_kernel);
}

}  // namespace flowprefill
