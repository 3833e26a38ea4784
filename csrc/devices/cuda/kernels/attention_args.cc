#include "devices/cuda/kernels/attention_args.h"

#include <algorithm>
#include <iterator>
#include <tuple>

#include "devices/cuda/kernels/attention_boxes.h"
#include "devices/cuda/kernels/expect.h"

namespace flowprefill {
namespace {

// Keys that the last entry of a tile of so many entries sees, of the tile's chunk.
int32_t num_keys(const AttentionTile& tile, int32_t heads_per_kv, int32_t size) {
  const int32_t last = std::min(tile.entry + size, tile.entries) - 1;
  const int32_t end = tile.position + last / heads_per_kv + 1;
  return tile.chunk_keys == 0 ? end : std::min(tile.chunk_keys, end - tile.chunk * tile.chunk_keys);
}

// Chunks of the keys up to the last row's.
int32_t num_chunks(const AttentionSlice& slice) {
  const int32_t keys = slice.position + slice.rows;
  return slice.chunk_keys == 0 ? 1 : (keys + slice.chunk_keys - 1) / slice.chunk_keys;
}

// The tiles of `size` entries from `entry` on, one for each chunk of keys that they see.
void add_tiles(std::vector<AttentionTile>& tiles, const AttentionSlice& slice, int32_t entry,
               int32_t heads_per_kv, int32_t size, int32_t partial) {
  AttentionTile tile{.row = slice.row,
                     .position = slice.position,
                     .sequence = slice.sequence + 1,
                     .entry = entry,
                     .entries = slice.rows * heads_per_kv,
                     .chunk_keys = slice.chunk_keys,
                     .partial = slice.chunk_keys == 0 ? 0 : partial,
                     .is_decode = slice.is_decode ? 1 : 0};
  for (; tile.chunk < num_chunks(slice) && num_keys(tile, heads_per_kv, size) > 0; ++tile.chunk)
    tiles.push_back(tile);
}

// by_chunk: of tiles with as many keys those of one chunk are neighbours, else those of a row.
std::vector<AttentionTile> tiles_of(std::span<const AttentionSlice> slices, int32_t heads_per_kv,
                                    int32_t size, bool by_chunk = false) {
  expect(heads_per_kv >= 1, "heads_per_kv", heads_per_kv, "at least 1");
  std::vector<AttentionTile> tiles;
  int64_t partial = 0;
  for (const AttentionSlice& slice : slices) {
    expect(slice.rows >= 1, "rows", slice.rows, "at least 1");
    expect(slice.row >= 0, "row", slice.row, "at least 0");
    expect(slice.position >= 0, "position", slice.position, "at least 0");
    expect(slice.sequence >= 0, "sequence", slice.sequence, "at least 0");
    expect(slice.chunk_keys >= 0 && slice.chunk_keys % kChunkStep == 0, "chunk_keys",
           slice.chunk_keys, "a multiple of 64 (0: not split)");
    const int64_t entries = int64_t{slice.rows} * heads_per_kv;
    expect(entries <= INT32_MAX - size, "rows", slice.rows,
           "rows times query heads per KV head below 2^31");
    expect(!slice.is_decode || entries <= kDecodeEntries, "rows", slice.rows,
           "rows times query heads per KV head at most 16 for decoding");
    for (int64_t entry = 0; entry < entries; entry += size)
      add_tiles(tiles, slice, static_cast<int32_t>(entry), heads_per_kv, size,
                static_cast<int32_t>(partial));
    partial += partial_rows_of(slice, heads_per_kv);
    expect(partial <= INT32_MAX, "partial rows", partial, "at most 2^31 - 1");
  }
  std::sort(tiles.begin(), tiles.end(), [&](const auto& a, const auto& b) {
    const auto rank = [&](const AttentionTile& tile) {
      return std::tuple(-num_keys(tile, heads_per_kv, size), tile.row, by_chunk ? tile.chunk : 0,
                        tile.entry, tile.chunk);
    };
    return rank(a) < rank(b);
  });
  return tiles;
}

void check_all_but_blocks(const AttentionArgs& args) {
  expect(has_attention_kernel(args.head_dim), "head_dim", args.head_dim, "64, 96, 128 or 256");
  expect(args.kv_heads >= 1 && args.kv_heads <= 65535, "kv_heads", args.kv_heads, "1..65535");
  expect(args.heads >= 1 && args.heads % args.kv_heads == 0, "heads", args.heads,
         "a positive multiple of kv_heads");
  expect(args.kv_begin >= 0 && args.kv_begin < args.kv_end && args.kv_end <= args.kv_heads,
         "kv_end", args.kv_end, "more than kv_begin, at most kv_heads");
  expect(args.num_tiles >= 1, "num_tiles", args.num_tiles, "at least 1");
  expect(args.num_merges >= 0, "num_merges", args.num_merges, "at least 0 (0: no chunks)");
  if (args.num_merges > 0) {
    expect(args.partial_rows >= 1, "partial_rows", args.partial_rows, "at least 1");
    expect(args.partials != nullptr, "partials", 0, "an address");
    expect_aligned("partials", args.partials);
  }
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

}  // namespace

int64_t partial_rows_of(const AttentionSlice& slice, int32_t heads_per_kv) {
  return slice.chunk_keys == 0 ? 0 : int64_t{slice.rows} * heads_per_kv * num_chunks(slice);
}

size_t attention_partial_bytes(int64_t partial_rows, int32_t kv_heads, int32_t head_dim) {
  return static_cast<size_t>(partial_rows) * static_cast<size_t>(kv_heads) *
         static_cast<size_t>(head_dim + 2) * sizeof(float);
}

std::vector<AttentionTile> attention_tiles(std::span<const AttentionSlice> slices,
                                           int32_t heads_per_kv) {
  return tiles_of(slices, heads_per_kv, kAttentionEntries);
}

std::vector<AttentionTile> attention_row_tiles(std::span<const AttentionSlice> slices,
                                               int32_t head_dim) {
  for (const AttentionSlice& slice : slices) {
    expect(!slice.is_decode, "is_decode", 1, "0: of many rows");
    if (slice.chunk_keys == 0)
      continue;
    expect(slice.chunk_keys % kRowChunkStep == 0, "chunk_keys", slice.chunk_keys,
           "a multiple of 128 (0: not split)");
    const int32_t last = slice.position + slice.rows - 1;
    expect(slice.position / slice.chunk_keys == last / slice.chunk_keys, "rows", slice.rows,
           "rows that end in the chunk in which the first does");
  }
  return tiles_of(slices, 1, attention_rows_of_tile(head_dim), /*by_chunk=*/true);
}

int32_t max_attention_row_tiles(int32_t rows, int32_t sequences, int32_t head_dim) {
  return rows / attention_rows_of_tile(head_dim) + std::min(rows, sequences);
}

bool has_hopper_head_size(int32_t head_dim) {
  return head_dim == 64 || head_dim == 128 || head_dim == 256;
}

bool has_hopper_block_size(int32_t block_tokens) {
  return block_tokens >= kLeastBoxTokens;
}

std::vector<AttentionTile> attention_merges(std::span<const AttentionTile> tiles) {
  std::vector<AttentionTile> merges;
  std::ranges::copy_if(tiles, std::back_inserter(merges), [](const AttentionTile& tile) {
    return tile.chunk_keys > 0 && tile.chunk == 0;
  });
  return merges;
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
  const int32_t decode_queries = shares_queries(head_dim) ? kDecodeEntries : 0;
  const int32_t rows = std::max(2 * attention_keys(head_dim) + queries,
                                kAttentionEntries * decode_buffers(head_dim) + decode_queries);
  return sizeof(Bf16) * static_cast<size_t>(rows) * static_cast<size_t>(attention_stride(head_dim));
}

void check(const AttentionArgs& args) {
  check_all_but_blocks(args);
  expect(args.num_merges == 0 || args.num_blocks >= 1, "num_blocks", args.num_blocks, "at least 1");
}

void check_rows(const AttentionArgs& args) {
  check_all_but_blocks(args);
  expect(has_hopper_head_size(args.head_dim), "head_dim", args.head_dim, "64, 128 or 256");
  expect(has_hopper_block_size(1 << args.cache.block_shift), "block_shift", args.cache.block_shift,
         "at least 3 (blocks of 8 tokens)");
  expect(args.rows >= 1, "rows", args.rows, "at least 1");
  expect(args.num_merges == 0 || args.window == 0, "num_merges", args.num_merges,
         "0 within a window: these tiles have no chunks");
  expect(int64_t{args.num_tiles} * args.heads <= INT32_MAX, "num_tiles", args.num_tiles,
         "tiles times heads below 2^31");
}

}  // namespace flowprefill
