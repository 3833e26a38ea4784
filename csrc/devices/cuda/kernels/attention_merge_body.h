// Body of the kernel that merges the partial results of attention over split keys, and where those
// lie. Called by attention.cu on the device, by tests/cpp/kernels on the host.
#pragma once

#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

// The partial result of one entry of a tile's slice over one chunk, for one KV head of the launch.
template <int kDim>
struct AttentionPartial {
  FP_HD AttentionPartial(const AttentionArgs& args, const AttentionTile& tile, int32_t chunk,
                         int32_t entry, int32_t head)
      : AttentionPartial(args, tile.partial + int64_t{chunk} * tile.entries + entry, head) {}
  FP_HD AttentionPartial(const AttentionArgs& args, int64_t row, int32_t head) {
    const int64_t heads = args.kv_end - args.kv_begin;
    out = args.partials + (row * heads + head) * kDim;
    peak_and_sum = args.partials + args.partial_rows * heads * kDim + (row * heads + head) * 2;
  }

  float* out;  // [kDim]
  float* peak_and_sum;
};

// Partial results of kAtOnce chunks of an entry, on their way at the same time. Lane i has
// dimensions i, i + 32, ...
template <int kDim>
struct AttentionParts {
  static constexpr int kAtOnce = 8;
  static constexpr int kColumns = kDim / 32;

  // Beyond the last chunk: that one again.
  template <class Thread>
  FP_HD void load(const Thread& t, const AttentionArgs& args, const AttentionTile& tile,
                  int32_t entry, int32_t chunk, int32_t last) {
    FP_UNROLL for (int i = 0; i < kAtOnce; ++i) {
      const AttentionPartial<kDim> partial(args, tile, smaller(chunk + i, last), entry,
                                           t.block_y());
      peaks_and_sums[i] = *reinterpret_cast<const Vec<float, 2>*>(partial.peak_and_sum);
      FP_UNROLL for (int c = 0; c < kColumns; ++c) out[i][c] = partial.out[t.lane() + 32 * c];
    }
  }

  Vec<float, 2> peaks_and_sums[kAtOnce];
  float out[kAtOnce][kColumns];
};

// One entry's output: sums over its chunks in ascending order, each scaled to the largest maximum.
// Which chunks there are depends on the entry's own position and window, and every one of them
// holds a key that the entry sees. 32 lanes. Few chunks' results and maxima are asked for at once:
// waiting for memory is all that takes time.
template <int kDim, class Thread>
FP_HD void merge_entry(const Thread& t, const AttentionArgs& args, const AttentionTile& tile,
                       int32_t entry) {
  using Parts = AttentionParts<kDim>;
  const int32_t group = args.heads / args.kv_heads;
  const int32_t position = tile.position + entry / group;
  const int32_t first_key = args.window > 0 ? larger(0, position - args.window + 1) : 0;
  const int32_t begin = first_key / tile.chunk_keys;
  const int32_t end = position / tile.chunk_keys + 1;
  Parts parts;
  parts.load(t, args, tile, entry, begin, end - 1);
  float peak = minus_infinity();
  for (int32_t chunk = begin + t.lane(); chunk < end; chunk += 32) {
    const float other = *AttentionPartial<kDim>(args, tile, chunk, entry, t.block_y()).peak_and_sum;
    peak = other > peak ? other : peak;
  }
  FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const float other = t.shuffle_xor(peak, mask);
    peak = other > peak ? other : peak;
  }
  float out[Parts::kColumns] = {};
  float sum = 0.0f;
  for (int32_t chunk = begin; chunk < end; chunk += Parts::kAtOnce) {
    if (chunk > begin)
      parts.load(t, args, tile, entry, chunk, end - 1);
    FP_UNROLL for (int i = 0; i < Parts::kAtOnce; ++i) {
      const float scale = chunk + i < end ? exp2_of(parts.peaks_and_sums[i].v[0] - peak) : 0.0f;
      sum += parts.peaks_and_sums[i].v[1] * scale;
      FP_UNROLL for (int c = 0; c < Parts::kColumns; ++c) out[c] += parts.out[i][c] * scale;
    }
  }
  const int32_t head = (args.kv_begin + t.block_y()) * group + entry % group;
  Bf16* to = args.out + (tile.row + entry / group) * args.ld_out + int64_t{head} * kDim;
  const float inverse = 1.0f / sum;
  FP_UNROLL for (int i = 0; i < Parts::kColumns; ++i)
      store(out[i] * inverse, to + t.lane() + 32 * i);
}

// block_x(): one of args.merges; block_y(): KV head, from kv_begin on; a warp per entry in turn.
// May be launched while the kernel before it runs: the list is no kernel's.
template <int kDim, class Thread>
FP_HD void attention_merge_body(const Thread& t, const AttentionArgs& args) {
  const AttentionTile tile = args.merges[t.block_x()];
  t.wait_for_predecessor();
  if (tile.sequence <= 0)
    return;
  const int32_t end = smaller(tile.entry + kAttentionEntries, tile.entries);
  for (int32_t entry = tile.entry + t.warp(); entry < end; entry += t.count() / 32)
    merge_entry<kDim>(t, args, tile, entry);
}

// The same of launch_attention_hopper(), whose slices have thousands of entries: kRowMergeBlocks
// blocks for each of args.merges, so that a warp has one entry.
constexpr int32_t kRowMergeWarps = 4;
constexpr int32_t kRowMergeBlocks = kAttentionEntries / kRowMergeWarps;

template <int kDim, class Thread>
FP_HD void attention_merge_rows_body(const Thread& t, const AttentionArgs& args) {
  const AttentionTile tile = args.merges[t.block_x() / kRowMergeBlocks];
  t.wait_for_predecessor();
  const int32_t entry = tile.entry + t.block_x() % kRowMergeBlocks * kRowMergeWarps + t.warp();
  if (tile.sequence > 0 && entry < tile.entries)
    merge_entry<kDim>(t, args, tile, entry);
}

}  // namespace flowprefill
