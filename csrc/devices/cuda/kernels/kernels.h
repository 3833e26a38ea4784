// Launches of every kernel: raw pointers, strides and a stream. Called by the CUDA programs while
// a segment is captured or run eagerly; wrap the result in FP_CUDA(...).
//
// All launches: throw std::invalid_argument for arguments that no kernel takes, before anything is
// launched; return what the launch returned; do not wait, allocate or synchronise, so they may be
// captured. Thread: the caller's, any. What a graph keeps is the addresses in the arguments:
// contents behind them (tokens, tables, tiles) may change from run to run, counts may not.
#pragma once

#include <cuda_runtime_api.h>

#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/fp8_args.h"
#include "devices/cuda/kernels/fused_product.h"
#include "devices/cuda/kernels/gemm_args.h"
#include "devices/cuda/kernels/row_args.h"
#include "devices/cuda/kernels/sample_args.h"
#include "devices/cuda/kernels/score_args.h"

namespace flowprefill {

// Lets our kernels start before the one before them in the stream has ended (programmatic dependent
// launch), or no more, for launches from now on: a captured graph keeps what held when it was
// captured. Returns what held before; at first that is the environment variable
// FLOWPREFILL_CUDA_PDL, 0 or 1. No result depends on it. Thread: any.
bool overlap_launches(bool on);

// Whether those on the current device do: where it is switched on and the device runs code compiled
// for compute capability 9.0 or above. Throws std::invalid_argument if the variable is neither 0
// nor 1. Thread: any.
bool overlaps_launches();

cudaError_t launch_embed(const EmbedArgs& args, cudaStream_t stream);
cudaError_t launch_rotary(const RotaryArgs& args, cudaStream_t stream);
template <typename Out>  // float or Bf16
cudaError_t launch_rms_norm(const RmsNormArgs<Out>& args, cudaStream_t stream);
cudaError_t launch_residual(const ResidualArgs& args, cudaStream_t stream);
cudaError_t launch_round(const RoundArgs& args, cudaStream_t stream);
cudaError_t launch_softcap(const SoftcapArgs& args, cudaStream_t stream);
template <typename In>  // float or Bf16
cudaError_t launch_rope(const RopeArgs<In>& args, cudaStream_t stream);
template <typename In>  // float or Bf16
cudaError_t launch_gate(const GateArgs<In>& args, cudaStream_t stream);
cudaError_t launch_quantise(const QuantiseArgs& args, cudaStream_t stream);
cudaError_t launch_widen(const WidenArgs& args, cudaStream_t stream);
cudaError_t launch_rescale(const RescaleArgs& args, cudaStream_t stream);
cudaError_t launch_sample(const SampleArgs& args, cudaStream_t stream);
cudaError_t launch_score(const ScoreArgs& args, cudaStream_t stream);
cudaError_t launch_pool(const PoolArgs& args, cudaStream_t stream);
cudaError_t launch_attention(const AttentionArgs& args, cudaStream_t stream);

// The same over the tiles of attention_row_tiles(), for devices of compute capability 9.0. Fails
// (cudaErrorInvalidDeviceFunction) where has_hopper_attention() is false: built without FlashInfer.
cudaError_t launch_attention_hopper(const AttentionArgs& args, cudaStream_t stream);
bool has_hopper_attention();

// Fails (cudaErrorNoKernelImageForDevice or the like) for a tile that gemm_tiles() does not name.
cudaError_t launch_gemm(const GemmArgs& args, GemmTile tile, cudaStream_t stream);

// By the kernel of few rows, with norm and rope where there are such.
cudaError_t launch_fused(const FusedProduct& args, cudaStream_t stream);

}  // namespace flowprefill
