// run_attention(): the attention kernels' bodies on the host, with the grids of attention.cu. Used
// by the tests of the bodies and by the double of the kernels.
#pragma once

#include <algorithm>
#include <cmath>

#include "devices/cuda/kernels/attention_body.h"
#include "simt.h"

namespace flowprefill::simt {

// Calls `run` with the head size as its template argument.
template <typename Run>
void with_head_size(int32_t head_dim, const Run& run) {
  switch (head_dim) {
    case 64:
      return run.template operator()<64>();
    case 96:
      return run.template operator()<96>();
    case 128:
      return run.template operator()<128>();
    default:
      return run.template operator()<256>();
  }
}

inline Grid attention_grid(const AttentionArgs& args, int32_t blocks, uint32_t seed) {
  return {.x = blocks,
          .y = args.kv_end - args.kv_begin,
          .threads = 128,
          .seed = seed,
          .overlaps = true};
}

using MadeBefore = std::function<bool(const void*)>;  // Grid::is_made_before

// The first kernel of launch_attention(). args: checked. seed: of the order in which threads run.
inline void run_attention_tiles(const AttentionArgs& args, uint32_t seed = 1,
                                const MadeBefore& is_made_before = nullptr) {
  with_head_size(args.head_dim, [&]<int kDim>() {
    Grid grid = attention_grid(args, num_blocks_of(args), seed);
    grid.shared_bytes = attention_shared_bytes(kDim);
    grid.is_made_before = is_made_before;
    launch(grid, [&](const Thread& t) { attention_body<kDim>(t, args); });
  });
}

// The second, where there are merges.
inline void run_attention_merges(const AttentionArgs& args, uint32_t seed = 1) {
  with_head_size(args.head_dim, [&]<int kDim>() {
    launch(attention_grid(args, args.num_merges, seed),
           [&](const Thread& t) { attention_merge_body<kDim>(t, args); });
  });
}

inline void run_attention(const AttentionArgs& args, uint32_t seed = 1,
                          const MadeBefore& is_made_before = nullptr) {
  run_attention_tiles(args, seed, is_made_before);
  if (args.num_merges > 0)
    run_attention_merges(args, seed);
}

// What Hopper's kernel makes of an item's row for one query head, in plain loops: its products and
// mask stand for those of FlashInfer's, its items, tables and partial results are ours.
template <int kDim>
void attend_row(const AttentionArgs& args, const AttentionTile& tile, int32_t row, int32_t head) {
  const int32_t size = attention_rows_of_tile(kDim);
  const int32_t group = args.heads / args.kv_heads;
  const AttentionItem item = item_of_tile(tile, size);
  const int32_t of_item = item.q_tile * size + row;
  const int32_t end = std::min(item.keys, of_item + 1 + item.keys - item.rows);
  const int32_t begin =
      args.window > 0 ? std::max(0, of_item + item.keys - item.rows - args.window + 1) : 0;
  const int32_t* table = args.block_tables + (tile.sequence - 1) * args.block_table_stride +
                         (item.first_key >> args.cache.block_shift);
  const int64_t column = int64_t{args.kv_begin * group + head} * kDim;
  const Bf16* q = args.q + (item.row + of_item) * args.ld_q + column;
  double sums[kDim] = {};
  double sum = 0, peak = -1e300;
  for (int32_t key = begin; key < end; ++key) {
    const int64_t at =
        args.cache.offset(table, key) + (args.kv_begin + head / group) * args.cache.head_stride;
    double score = 0;
    for (int i = 0; i < kDim; ++i)
      score += double{widen(q[i])} * widen(args.cache.keys[at + i]);
    if (args.softcap > 0)
      score = args.softcap * std::tanh(score / args.softcap);
    const double keep = std::exp2(peak - std::max(peak, score));
    peak = std::max(peak, score);
    const double p = std::exp2(score - peak);
    sum = sum * keep + p;
    for (int i = 0; i < kDim; ++i)
      sums[i] = sums[i] * keep + p * widen(args.cache.values[at + i]);
  }
  if (tile.chunk_keys == 0) {
    Bf16* out = args.out + (item.row + of_item) * args.ld_out + column;
    for (int i = 0; i < kDim; ++i)
      store(static_cast<float>(sums[i] / sum), out + i);
    return;
  }
  const AttentionPartial<kDim> partial(
      args, partial_row_of(tile, tile.entry + row, head % group, group), head / group);
  for (int i = 0; i < kDim; ++i)
    partial.out[i] = static_cast<float>(sums[i] / sum);
  partial.peak_and_sum[0] = static_cast<float>(peak + std::log2(sum));
  partial.peak_and_sum[1] = 1.0f;
}

// The first kernel of launch_attention_hopper().
inline void run_attention_rows(const AttentionArgs& args) {
  const int32_t heads = (args.kv_end - args.kv_begin) * (args.heads / args.kv_heads);
  with_head_size(args.head_dim, [&]<int kDim>() {
    for (int32_t i = 0; i < args.num_tiles && args.tiles[i].sequence > 0; ++i) {
      const AttentionTile& tile = args.tiles[i];
      const int32_t rows = std::min(attention_rows_of_tile(kDim), tile.entries - tile.entry);
      for (int32_t row = 0; row < rows; ++row) {
        for (int32_t head = 0; head < heads; ++head)
          attend_row<kDim>(args, tile, row, head);
      }
    }
  });
}

// The second, where there are merges.
inline void run_attention_row_merges(const AttentionArgs& args, uint32_t seed = 1) {
  with_head_size(args.head_dim, [&]<int kDim>() {
    Grid grid = attention_grid(args, args.num_merges * kRowMergeBlocks, seed);
    grid.threads = 32 * kRowMergeWarps;
    launch(grid, [&](const Thread& t) { attention_merge_rows_body<kDim>(t, args); });
  });
}

}  // namespace flowprefill::simt
