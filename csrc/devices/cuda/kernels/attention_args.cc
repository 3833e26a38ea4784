#include "devices/cuda/kernels/attention_args.h"

#include <algorithm>
#include <tuple>

#include "devices/cuda/kernels/expect.h"

namespace flowprefill {
namespace {

// Keys up to the tile's last entry.
int32_t key_end(const AttentionTile& tile, int32_t heads_per_kv) {
  const int32_t last = std::min(tile.entry + kAttentionEntries, tile.entries) - 1;
  return tile.position + last / heads_per_kv + 1;
}

}  // namespace

std::vector<AttentionTile> attention_tiles(std::span<const AttentionSlice> slices,
                                           int32_t heads_per_kv) {
  expect(heads_per_kv >= 1, "heads_per_kv", heads_per_kv, "at least 1");
  std::vector<AttentionTile> tiles;
  for (const AttentionSlice& slice : slices) {
    expect(slice.rows >= 1, "rows", slice.rows, "at least 1");
    expect(slice.row >= 0, "row", slice.row, "at least 0");
    expect(slice.position >= 0, "position", slice.position, "at least 0");
    expect(slice.sequence >= 0, "sequence", slice.sequence, "at least 0");
    const int64_t entries = int64_t{slice.rows} * heads_per_kv;
    expect(entries <= INT32_MAX - kAttentionEntries, "rows", slice.rows,
           "rows times query heads per KV head below 2^31");
    for (int64_t entry = 0; entry < entries; entry += kAttentionEntries) {
      tiles.push_back({.row = slice.row,
                       .position = slice.position,
                       .sequence = slice.sequence + 1,
                       .entry = static_cast<int32_t>(entry),
                       .entries = static_cast<int32_t>(entries)});
    }
  }
  std::sort(tiles.begin(), tiles.end(), [&](const auto& a, const auto& b) {
    const auto rank = [&](const AttentionTile& tile) {
      return std::tuple(-key_end(tile, heads_per_kv), tile.row, tile.entry);
    };
    return rank(a) < rank(b);
  });
  return tiles;
}

int32_t max_attention_tiles(int32_t rows, int32_t sequences, int32_t heads_per_kv) {
  // Each sequence can leave one tile unfilled.
  const int64_t entries = int64_t{rows} * heads_per_kv;
  return static_cast<int32_t>(entries / kAttentionEntries + std::min(rows, sequences));
}

bool has_attention_kernel(int32_t head_dim) {
  return head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

size_t attention_shared_bytes(int32_t head_dim) {
  const int32_t queries = shares_queries(head_dim) ? kAttentionEntries : 0;
  const auto rows = static_cast<size_t>(2 * attention_keys(head_dim) + queries);
  return sizeof(Bf16) * rows * static_cast<size_t>(head_dim + 8);
}

void check(const AttentionArgs& args) {
  expect(has_attention_kernel(args.head_dim), "head_dim", args.head_dim, "64, 96, 128 or 256");
  expect(args.kv_heads >= 1 && args.kv_heads <= 65535, "kv_heads", args.kv_heads, "1..65535");
  expect(args.heads >= 1 && args.heads % args.kv_heads == 0, "heads", args.heads,
         "a positive multiple of kv_heads");
  expect(args.kv_begin >= 0 && args.kv_begin < args.kv_end && args.kv_end <= args.kv_heads,
         "kv_end", args.kv_end, "more than kv_begin, at most kv_heads");
  expect(args.num_tiles >= 1, "num_tiles", args.num_tiles, "at least 1");
  expect(args.window >= 0, "window", args.window, "at least 0 (0: all keys)");
  expect(args.softcap >= 0, "softcap", static_cast<int64_t>(args.softcap), "at least 0 (0: none)");
  expect(args.ld_q % 8 == 0 && args.ld_out % 8 == 0, "ld_q, ld_out", args.ld_q | args.ld_out,
         "multiples of 8");
  const CacheView& cache = args.cache;
  expect(cache.block_shift >= 0 && cache.block_shift < 31, "block_shift", cache.block_shift,
         "0..30");
  expect((cache.block_stride | cache.token_stride | cache.head_stride) % 8 == 0, "cache strides",
         cache.block_stride | cache.token_stride | cache.head_stride, "multiples of 8");
  expect_aligned("keys", cache.keys);
  expect_aligned("values", cache.values);
  expect_aligned("q", args.q);
  expect_aligned("out", args.out);
}

}  // namespace flowprefill
