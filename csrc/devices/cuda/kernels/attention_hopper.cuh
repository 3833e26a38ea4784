// Attention of many rows on compute capability 9.0: FlashInfer's prefill kernel (products by wgmma)
// with our loads through the block tables (attention_hopper_loads.cuh), our list of tiles and our
// scores in base 2. Included by attention_hopper_*.cu, one head size each; compiled for sm_90a
// only.
#pragma once

// FlashInfer's header of this name includes parts of CUTLASS that want curand; its kernel needs
// these.
#define FLASHINFER_CUTLASS_UTILS_CUH_
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cutlass/cutlass.h>
#include <cutlass/numeric_types.h>
#include <cute/tensor.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <flashinfer/attention/hopper/prefill_sm90.cuh>

#include "devices/cuda/kernels/attention_hopper.h"
#include "devices/cuda/kernels/attention_hopper_loads.cuh"

namespace flowprefill {
namespace {

// What the scores of a launch go through.
struct ScoreParams {
  float softcap;  // 0: they stay
  float inverse;
};

// Scores are powers of two already: queries carry log2(e) / sqrt(head_dim). The cap stays in the
// launch's parameters: registers are scarce.
template <bool kCaps>
struct BaseTwoScores {
  template <typename Params, typename Coordinates>
  __device__ BaseTwoScores(const Params&, const Coordinates&) {}

  template <int kRowsPerThread>
  __device__ auto GetAttentionUpdater() {
    return flashinfer::OnlineSoftmax<kRowsPerThread, /*WITH_SCALE=*/false>(1.0f);
  }

  template <typename Params, typename T>
  __device__ __forceinline__ T LogitsTransform(const Params& params, T score, uint32_t, uint32_t,
                                               uint32_t, uint32_t, uint32_t) {
    if constexpr (kCaps) {
      return soft_cap(score, params.additional_params.softcap, params.additional_params.inverse);
    } else {
      return score;
    }
  }
};

// Blocks take the items (tile, query head) in turn, see item_of_turn(); heads of a tile are
// neighbours, so that blocks that run together read the same keys. Padding comes last.
struct TileScheduler {
  struct Params {
    const AttentionTile* tiles;
    int num_items;
    cutlass::FastDivmod heads;
    cutlass::FastDivmod group;
    int table_stride;
    int rows_of_tile;
  };

  struct WorkTileInfo {
    int turn = 0;
    int q_tile = 0;
    int head = 0;
    int kv_head = 0;
    int row = 0;
    int table = 0;
    int rows = 0;
    int keys = 0;
    bool is_live = false;

    CUTLASS_DEVICE bool is_valid(const Params&) const { return is_live; }
    CUTLASS_DEVICE auto get_block_coord(const Params&) const {
      return cute::tuple{q_tile, head, kv_head, row, table, rows, keys, /*batch_idx=*/0};
    }
  };

  CUTLASS_DEVICE static WorkTileInfo work(const Params& params, int turn) {
    WorkTileInfo info;
    info.turn = turn;
    const int item = item_of_turn(turn, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    if (item >= params.num_items)
      return info;
    int index;
    params.heads(index, info.head, item);
    const AttentionTile& tile = params.tiles[index];
    info.is_live = tile.sequence > 0;
    info.kv_head = params.group.divide(info.head);
    info.q_tile = tile.entry / params.rows_of_tile;
    info.row = tile.row;
    info.table = (tile.sequence - 1) * params.table_stride;
    info.rows = tile.entries;
    info.keys = tile.position + tile.entries;
    return info;
  }
  CUTLASS_DEVICE WorkTileInfo get_initial_work(const Params& params) const {
    return work(params, 0);
  }
  template <bool kIsProducer = false>
  CUTLASS_DEVICE WorkTileInfo get_next_work(const Params& params, const WorkTileInfo& last) const {
    return work(params, last.turn + 1);
  }
  CUTLASS_DEVICE void init_consumer() const {}
  CUTLASS_DEVICE void prefetch_next_work(const Params&, WorkTileInfo&) const {}
  CUTLASS_DEVICE void broadcast_next_work(WorkTileInfo&) const {}
};

template <int kDim, bool kHasWindow, bool kCaps>
struct Hopper {
  using Element = cutlass::bfloat16_t;
  // Keys at once. More spill no registers, but neither 160 nor 176 were as fast in heads of 128,
  // nor 96 nor 112.
  static constexpr int kKeys = kDim == 256 ? 64 : 128;
  using Traits = HopperTraits<kDim, attention_rows_of_tile(kDim), kKeys, BaseTwoScores<kCaps>>;
  using Mainloop = PagedLoads<ScoreParams, Traits>;
  using Epilogue = flashinfer::CollectiveEpilogue<Traits>;

  static typename Epilogue::Params epilogue(const AttentionArgs& args) {
    const int heads_per_kv = args.heads / args.kv_heads;
    const int heads = (args.kv_end - args.kv_begin) * heads_per_kv;
    const int64_t first = int64_t{args.kv_begin} * heads_per_kv * kDim;
    return Epilogue::to_underlying_arguments(
        {reinterpret_cast<Element*>(args.out + first),
         flashinfer::get_gmem_layout(args.rows, heads, kDim, args.ld_out, kDim),
         /*lse_ptr=*/nullptr, flashinfer::get_lse_gmem_layout(args.rows, heads)});
  }

  static cudaError_t launch(const AttentionArgs& args, cudaStream_t stream) {
    const auto kernel = flashinfer::PrefillWithKVCacheKernel<Mainloop, Epilogue, Traits, kHasWindow,
                                                             /*CAUSAL=*/true, TileScheduler>;
    constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
    int device = 0;
    int multiprocessors = 0;
    cudaError_t code = cudaGetDevice(&device);
    if (code == cudaSuccess)
      code = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (code == cudaSuccess) {
      code =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    }
    typename Mainloop::Params loads;
    if (code == cudaSuccess)
      code = Mainloop::describe(args, {args.softcap, args.softcap > 0 ? 1.0f / args.softcap : 0.0f},
                                &loads);
    if (code != cudaSuccess)
      return code;
    const int group = args.heads / args.kv_heads;
    const int heads = (args.kv_end - args.kv_begin) * group;
    const int items = args.num_tiles * heads;
    const TileScheduler::Params tiles{args.tiles,
                                      items,
                                      cutlass::FastDivmod(heads),
                                      cutlass::FastDivmod(group),
                                      static_cast<int>(args.block_table_stride),
                                      attention_rows_of_tile(kDim)};
    const int blocks = items < multiprocessors ? items : multiprocessors;
    kernel<<<blocks, Traits::NUM_WARPS * 32, kSharedBytes, stream>>>(loads, epilogue(args), tiles);
    return cudaGetLastError();
  }
};

// Each instance takes half a minute to compile; the one with a cap takes any window, or none.
template <int kDim>
cudaError_t launch_hopper(const AttentionArgs& args, cudaStream_t stream) {
  if (args.softcap > 0)
    return Hopper<kDim, true, true>::launch(args, stream);
  return args.window > 0 ? Hopper<kDim, true, false>::launch(args, stream)
                         : Hopper<kDim, false, false>::launch(args, stream);
}

}  // namespace
}  // namespace flowprefill
