// The loads of Hopper's attention: queries, keys and values by TMA, the keys and values box by box
// as the block table says. Fills in for the loads of FlashInfer's kernel for keys in one piece.
// Included by attention_hopper.cuh, which also says what has to be included before.
#pragma once

#include <cuda.h>

#include "devices/cuda/kernels/attention_boxes.h"

namespace flowprefill {
namespace {

// A row of a box: what TMA and the products swizzle together.
constexpr int kBoxWidth = 64;

// FlashInfer's, and a barrier for the values that TMA alone cannot bring.
template <int kDim, int kRows, int kKeys, typename Scores>
struct HopperTraits
    : flashinfer::AttentionKernelTraits</*USE_TMA_LOAD_KV=*/true, kDim, kDim, kRows, kKeys,
                                        /*NUM_STAGES_=*/2, cutlass::bfloat16_t, cutlass::bfloat16_t,
                                        cutlass::bfloat16_t, int32_t, Scores> {
  using Base =
      flashinfer::AttentionKernelTraits<true, kDim, kDim, kRows, kKeys, 2, cutlass::bfloat16_t,
                                        cutlass::bfloat16_t, cutlass::bfloat16_t, int32_t, Scores>;
  struct SharedStorage : Base::SharedStorage {
    cutlass::arch::ClusterTransactionBarrier barrier_end;
  };
};

// Whether boxes of whole rows, side by side for each kBoxWidth elements, are what the products read
// from a stage of this layout. A sum of what rows, columns and stages add, so each is looked at
// alone.
template <typename Layout>
constexpr bool consists_of_boxes(Layout layout, int rows, int columns) {
  const auto at = [&](int row, int column, int stage) {
    if constexpr (cute::rank(Layout{}) == 3)
      return int(layout.layout_b()(row, column, stage));
    else
      return int(layout.layout_b()(row, column)) + stage * rows * columns;
  };
  for (int row = 0; row < rows; ++row) {
    if (at(row, 0, 0) != row * kBoxWidth)
      return false;
  }
  for (int column = 0; column < columns; ++column) {
    if (at(0, column, 0) != column % kBoxWidth + column / kBoxWidth * kBoxWidth * rows)
      return false;
  }
  return at(0, 0, 1) == rows * columns &&
         std::is_same_v<decltype(cute::get_swizzle_portion(layout)), cute::Swizzle<3, 4, 3>>;
}

// Elements of a tensor in global memory, dimensions of a head innermost.
struct TensorView {
  const Bf16* at;
  cuuint64_t sizes[4];
  int64_t strides[3];  // of all but the innermost, in elements
};

// False where the driver refuses, which it does for no view that check() allows.
inline bool describe_boxes(const TensorView& view, int box_rows, CUtensorMap* map) {
  cuuint64_t strides[3];
  for (int i = 0; i < 3; ++i)
    strides[i] = static_cast<cuuint64_t>(view.strides[i]) * sizeof(Bf16);
  const cuuint32_t box[4] = {kBoxWidth, static_cast<cuuint32_t>(box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
             map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4u, const_cast<Bf16*>(view.at), &view.sizes[0],
             &strides[0], &box[0], &steps[0], CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// One warp loads; the kernel gives it 24 registers a thread.
template <typename ScoreParams, typename Traits>
struct PagedLoads : flashinfer::CollectiveMainloop<ScoreParams, Traits, /*CAUSAL=*/true> {
  using Base = flashinfer::CollectiveMainloop<ScoreParams, Traits, true>;
  using Element = typename Traits::DTypeKV;
  using Pipeline = typename Base::MainloopPipeline;
  using State = typename Base::PipelineState;
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  static constexpr int kRows = Traits::CTA_Q;
  static constexpr int kKeys = Traits::CTA_KV;
  static constexpr int kDim = Traits::HEAD_DIM_QK;
  static_assert(consists_of_boxes(typename Traits::SmemLayoutQ{}, kRows, kDim));
  static_assert(consists_of_boxes(typename Traits::SmemLayoutK{}, kKeys, kDim));
  static_assert(consists_of_boxes(typename Traits::SmemLayoutV{}, kKeys, kDim));
  static_assert(kKeys / kLeastBoxTokens <= 32, "a lane for each box");

  struct Params {
    CUtensorMap queries;
    CUtensorMap keys;
    CUtensorMap values;
    const int32_t* tables;
    AttentionBoxes boxes;
    int window_left;
    ScoreParams additional_params;
  };

  static cudaError_t describe(const AttentionArgs& args, const ScoreParams& scores, Params* out) {
    const CacheView& cache = args.cache;
    const int group = args.heads / args.kv_heads;
    const auto kv_heads = static_cast<cuuint64_t>(args.kv_end - args.kv_begin);
    const int64_t first = args.kv_begin * cache.head_stride;
    out->tables = args.block_tables;
    out->boxes = AttentionBoxes(kKeys, cache.block_shift);
    out->window_left = args.window > 0 ? args.window - 1 : INT32_MAX / 2;
    out->additional_params = scores;
    const TensorView queries{args.q + int64_t{args.kv_begin} * group * kDim,
                             {kDim, static_cast<cuuint64_t>(args.rows), kv_heads * group, 1},
                             {args.ld_q, kDim, args.ld_q}};
    // Tables hold no number that is too large, so the cache's size need not be known.
    TensorView kv{cache.keys + first,
                  {kDim, cuuint64_t{1} << cache.block_shift, kv_heads, cuuint64_t{1} << 31},
                  {cache.token_stride, cache.head_stride, cache.block_stride}};
    bool is_done = describe_boxes(queries, kRows, &out->queries);
    is_done = is_done && describe_boxes(kv, out->boxes.tokens(), &out->keys);
    kv.at = cache.values + first;
    is_done = is_done && describe_boxes(kv, out->boxes.tokens(), &out->values);
    return is_done ? cudaSuccess : cudaErrorInvalidValue;
  }

  CUTLASS_DEVICE static void prefetch_tma_descriptors(const Params& params) {
    cute::prefetch_tma_descriptor(&params.queries);
    cute::prefetch_tma_descriptor(&params.keys);
    cute::prefetch_tma_descriptor(&params.values);
  }

  CUTLASS_DEVICE int get_num_kv_tiles(const Params&, int q_tile, int rows, int keys) const {
    const int end = (q_tile + 1) * kRows + keys - rows;
    return ((end < keys ? end : keys) + kKeys - 1) / kKeys;
  }

  // The tiles of one item, the last first, as the products take them. All lanes come here together.
  template <bool kHasWindow, typename Coordinates, typename Scheduler, typename Shared>
  CUTLASS_DEVICE void load(const Params& params, Pipeline key_stages, Pipeline value_stages,
                           State& key_stage, State& value_stage, Shared& shared, Scheduler&,
                           const typename Scheduler::Params&, typename Scheduler::WorkTileInfo&,
                           const Coordinates& coordinates, int work) {
    const auto [q_tile, head, kv_head, row, table, rows, keys, batch] = coordinates;
    const Item item{params.tables + table, kv_head, keys};
    const int last = get_num_kv_tiles(params, q_tile, rows, keys) - 1;
    int first = 0;
    if constexpr (kHasWindow) {
      first = flashinfer::get_swa_begin_kv_tile_idx<kRows, kKeys>(params.window_left, q_tile, rows,
                                                                  keys);
    }
    const auto load_keys = [&](int tile, int blocks) {
      load_tile(params, item, params.keys, key_stages, key_stage, shared.smem_k.data(), tile,
                blocks);
    };
    if (work == 0)
      init_end(shared.barrier_end);
    int blocks = block_of_lane(params, item, last);
    load_keys(last, blocks);
    load_queries(params, shared, row + q_tile * kRows, head);
    shared.barrier_O.wait((work + 1) % 2);
    for (int tile = last; tile >= first; --tile) {
      int next = 0;
      if (tile > first) {
        next = block_of_lane(params, item, tile - 1);
        load_keys(tile - 1, next);
      }
      const int end = keys - tile * kKeys;
      if (end < kKeys && params.boxes.within(end) != 0)
        load_end_of_values(params, item, value_stages, value_stage, shared, tile, blocks);
      else
        load_tile(params, item, params.values, value_stages, value_stage, shared.smem_v.data(),
                  tile, blocks);
      blocks = next;
    }
  }

  CUTLASS_DEVICE void load_tail(Pipeline key_stages, Pipeline value_stages, State& key_stage,
                                State& value_stage) {
    key_stages.producer_tail(key_stage);
    value_stages.producer_tail(value_stage);
  }

 private:
  struct Item {
    const int32_t* table;
    int kv_head;
    int keys;
  };
  static constexpr auto kKept = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);

  uint32_t end_phase_ = 0;

  CUTLASS_DEVICE static int lane() { return static_cast<int>(threadIdx.x) % 32; }

  CUTLASS_DEVICE static void init_end(Barrier& barrier) {
    if (cute::elect_one_sync())
      barrier.init(1);
    cutlass::arch::fence_barrier_init();
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
  }

  // Where a lane's box of a tile lies. A number below zero brings zeros: the table may end.
  CUTLASS_DEVICE static int block_of_lane(const Params& params, const Item& item, int tile) {
    const int key = lane() << params.boxes.shift;
    const int position = tile * kKeys + key;
    return key < kKeys ? params.boxes.block(item.table, position, item.keys) : -1;
  }

  CUTLASS_DEVICE static void copy(const Params& params, const Item& item, const CUtensorMap& map,
                                  uint64_t* barrier, Element* to, int tile, int blocks) {
    const int tokens = params.boxes.tokens();
    for (int key = 0; key < kKeys; key += tokens) {
      const int block = __shfl_sync(0xffffffffu, blocks, key >> params.boxes.shift);
      const int slot = params.boxes.slot(tile * kKeys + key);
      if (!cute::elect_one_sync())
        continue;
      CUTLASS_PRAGMA_UNROLL
      for (int d = 0; d < kDim; d += kBoxWidth) {
        cute::SM90_TMA_LOAD_4D::copy(&map, barrier, kKept, to + key * kBoxWidth + d * kKeys, d,
                                     slot, item.kv_head, block);
      }
    }
  }

  template <typename Shared>
  CUTLASS_DEVICE static void load_queries(const Params& params, Shared& shared, int row, int head) {
    // Until the products have read those of the item before.
    cutlass::arch::NamedBarrier::sync(
        Traits::NUM_MMA_THREADS + Traits::NUM_PRODUCER_THREADS,
        static_cast<uint32_t>(flashinfer::NamedBarriers::kQueryEmpty));
    if (!cute::elect_one_sync())
      return;
    shared.barrier_Q.arrive_and_expect_tx(Base::TmaTransactionBytesQ);
    CUTLASS_PRAGMA_UNROLL
    for (int d = 0; d < kDim; d += kBoxWidth) {
      cute::SM90_TMA_LOAD_4D::copy(&params.queries, reinterpret_cast<uint64_t*>(&shared.barrier_Q),
                                   kKept, shared.smem_q.data() + d * kRows, d, row, head, 0);
    }
  }

  // A tile into the next stage of `to`.
  CUTLASS_DEVICE static void load_tile(const Params& params, const Item& item,
                                       const CUtensorMap& map, Pipeline& stages, State& stage,
                                       Element* to, int tile, int blocks) {
    stages.producer_acquire(stage);
    copy(params, item, map, stages.producer_get_barrier(stage), to + stage.index() * kKeys * kDim,
         tile, blocks);
    ++stage;
  }

  // The values of a tile that ends within a block. What lies in the block's other slots may be NaN,
  // which a probability of 0 does not undo: they are overwritten before the products see the stage.
  template <typename Shared>
  CUTLASS_DEVICE void load_end_of_values(const Params& params, const Item& item, Pipeline& stages,
                                         State& stage, Shared& shared, int tile, int blocks) {
    while (stages.producer_try_acquire(stage) != cutlass::BarrierStatus::WaitDone) {
    }
    Element* const to = shared.smem_v.data() + stage.index() * kKeys * kDim;
    Barrier& barrier = shared.barrier_end;
    if (cute::elect_one_sync())
      barrier.arrive_and_expect_tx(Base::TmaTransactionBytesV);
    copy(params, item, params.values, reinterpret_cast<uint64_t*>(&barrier), to, tile, blocks);
    barrier.wait(end_phase_);
    end_phase_ ^= 1;
    const int end = item.keys - tile * kKeys;
    const int spoilt = params.boxes.tokens() - params.boxes.within(end);
    for (int d = 0; d < kDim; d += kBoxWidth) {
      for (int i = lane() * 8; i < spoilt * kBoxWidth; i += 32 * 8)
        *reinterpret_cast<uint4*>(to + end * kBoxWidth + d * kKeys + i) = uint4{0, 0, 0, 0};
    }
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (cute::elect_one_sync())
      Barrier::arrive(stages.producer_get_barrier(stage));
    ++stage;
  }
};

}  // namespace
}  // namespace flowprefill
