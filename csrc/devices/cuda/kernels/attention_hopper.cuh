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
#include "devices/cuda/kernels/attention_merge_body.h"
#include "devices/cuda/kernels/launch.cuh"

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
    int block_shift;
    int rows_of_tile;

    // Of a block's turn; false: it has none. The item is head `head` of a tile.
    CUTLASS_DEVICE bool find(int turn, int* tile, int* head) const {
      const int item =
          item_of_turn(turn, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
      if (item < num_items)
        heads(*tile, *head, item);
      return item < num_items;
    }
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
      return cute::tuple{q_tile, head, kv_head, row, table, rows, keys, /*batch_idx=*/turn};
    }
  };

  CUTLASS_DEVICE static WorkTileInfo work(const Params& params, int turn) {
    WorkTileInfo info;
    info.turn = turn;
    int index;
    if (!params.find(turn, &index, &info.head))
      return info;
    const AttentionTile& tile = params.tiles[index];
    const AttentionItem item = item_of_tile(tile, params.rows_of_tile);
    info.is_live = tile.sequence > 0;
    info.kv_head = params.group.divide(info.head);
    info.q_tile = item.q_tile;
    info.row = item.row;
    info.table = (tile.sequence - 1) * params.table_stride + (item.first_key >> params.block_shift);
    info.rows = item.rows;
    info.keys = item.keys;
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

// FlashInfer's, but for tiles of one chunk: their output goes from the registers, as float, to
// where the merge looks for it. Divided by its sum, so its maximum and sum there are the logarithm
// of the sum, and 1.
template <typename Traits>
struct ChunkEpilogue : flashinfer::CollectiveEpilogue<Traits> {
  using Base = flashinfer::CollectiveEpilogue<Traits>;
  static constexpr int kRows = Traits::CTA_Q;
  static constexpr int kDim = Traits::HEAD_DIM_VO;

  struct Params : Base::Params {
    TileScheduler::Params items;
    AttentionArgs args;
  };

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params&) {}

  template <typename Coordinates, typename Shared, typename Output, typename LogSum, typename Mma>
  CUTLASS_DEVICE void store(const Params& params, const Output& output, const LogSum& log_sum,
                            Shared& shared, Mma mma, int thread, const Coordinates& coordinates) {
    int index = 0, head = 0;
    params.items.find(cute::get<7>(coordinates), &index, &head);
    const AttentionTile& tile = params.items.tiles[index];
    if (tile.chunk_keys == 0)
      Base::store(params, output, log_sum, shared, mma, thread, coordinates);
    else
      store_partial(params, tile, head, output, log_sum, mma, thread);
  }

 private:
  // A thread has a part of some rows: pairs of neighbouring columns.
  template <typename Output, typename LogSum, typename Mma>
  CUTLASS_DEVICE static void store_partial(const Params& params, const AttentionTile& tile,
                                           int head, const Output& output, const LogSum& log_sum,
                                           Mma mma, int thread) {
    const auto by_row = [](const auto& fragment) {
      return cute::make_tensor(fragment.data(),
                               flashinfer::convert_layout_acc_rowcol(fragment.layout()));
    };
    const auto values = by_row(output);
    const auto places = by_row(mma.get_thread_slice(thread).partition_C(
        cute::make_identity_tensor(cute::Shape<cute::Int<kRows>, cute::Int<kDim>>{})));
    int kv_head, head_in_group;
    params.items.group(kv_head, head_in_group, head);
    const int group = params.items.group.divisor;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < cute::size<0>(values); ++i) {
      const int row = tile.entry + cute::get<0>(places(i, 0));
      if (row >= tile.entries)
        continue;
      const AttentionPartial<kDim> partial(
          params.args, partial_row_of(tile, row, head_in_group, group), kv_head);
      const int column = cute::get<1>(places(i, 0));
      if (column == 0)
        *reinterpret_cast<float2*>(partial.peak_and_sum) = {log_sum(i), 1.0f};
      CUTLASS_PRAGMA_UNROLL
      for (int j = 0; j < cute::size<1>(values); j += 2) {
        *reinterpret_cast<float2*>(partial.out + cute::get<1>(places(i, j))) = {values(i, j),
                                                                                values(i, j + 1)};
      }
    }
  }
};

template <int kDim>
__global__ void __launch_bounds__(kRowMergeWarps * 32)
    attention_merge_rows_kernel(AttentionArgs args) {
  attention_merge_rows_body<kDim>(beside_predecessor(nullptr), args);
}

template <int kDim, bool kHasWindow, bool kCaps>
struct Hopper {
  using Element = cutlass::bfloat16_t;
  // Keys at once. More spill no registers, but neither 160 nor 176 were as fast in heads of 128,
  // nor 96 nor 112.
  static constexpr int kKeys = kDim == 256 ? 64 : 128;
  using Traits = HopperTraits<kDim, attention_rows_of_tile(kDim), kKeys, BaseTwoScores<kCaps>>;
  using Mainloop = PagedLoads<ScoreParams, Traits>;
  using Epilogue = ChunkEpilogue<Traits>;

  static typename Epilogue::Params epilogue(const AttentionArgs& args,
                                            const TileScheduler::Params& items) {
    const int heads_per_kv = args.heads / args.kv_heads;
    const int heads = (args.kv_end - args.kv_begin) * heads_per_kv;
    const int64_t first = int64_t{args.kv_begin} * heads_per_kv * kDim;
    return {{reinterpret_cast<Element*>(args.out + first),
             flashinfer::get_gmem_layout(args.rows, heads, kDim, args.ld_out, kDim),
             /*lse_ptr=*/nullptr, flashinfer::get_lse_gmem_layout(args.rows, heads)},
            items,
            args};
  }

  // Adds up the chunks.
  static cudaError_t launch_merge(const AttentionArgs& args, cudaStream_t stream) {
    const dim3 blocks(static_cast<unsigned>(args.num_merges * kRowMergeBlocks),
                      static_cast<unsigned>(args.kv_end - args.kv_begin));
    return launch_kernel(attention_merge_rows_kernel<kDim>, blocks, kRowMergeWarps * 32, 0, stream,
                         args);
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
                                      args.cache.block_shift,
                                      attention_rows_of_tile(kDim)};
    const int blocks = items < multiprocessors ? items : multiprocessors;
    kernel<<<blocks, Traits::NUM_WARPS * 32, kSharedBytes, stream>>>(loads, epilogue(args, tiles),
                                                                     tiles);
    code = cudaGetLastError();
    return code == cudaSuccess && args.num_merges > 0 ? launch_merge(args, stream) : code;
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
