// AttentionArgs, AttentionTile: causal attention of ragged rows over the paged KV cache, cut into
// tiles. Tiles are made on the host per run (attention_tiles), uploaded, and read by the kernel.
// Where few rows have many keys, the keys are split into chunks too (attention_split.h), and those
// of rows far back in a long sequence (graph/key_chunks.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "devices/cuda/kernels/batch_view.h"
#include "devices/cuda/kernels/portable.h"

namespace flowprefill {

constexpr int32_t kAttentionEntries = 64;  // (row, query head) pairs of one tile
constexpr int32_t kDecodeEntries = 16;     // most of a slice that attention_decode_body.h computes
constexpr int32_t kChunkStep = 64;         // chunks are whole steps of keys of every kernel
constexpr int32_t kRowChunkStep = 128;     // and of launch_attention_hopper()

// Keys that a tile takes at once: fewer where its output fills the registers. Such a tile keeps its
// queries in shared memory for the same reason.
constexpr int32_t attention_keys(int32_t head_dim) {
  return head_dim > 128 ? 32 : 64;
}
constexpr bool shares_queries(int32_t head_dim) {
  return head_dim > 128;
}

// Elements of a row of shared memory. 16 bytes of padding make them an odd number of 16-byte words,
// so that the 8 rows of a matrix lie in different banks.
constexpr int32_t attention_stride(int32_t head_dim) {
  return head_dim + 8;
}

// Buffers of 16 keys or values that each warp of a decode tile fills in turn; even. So many that
// two blocks keep more bytes in flight than a multiprocessor's share of the memory's rate needs (33
// KB at 4.3 TB/s and 1 us) and fit together into the shared memory that an A100's has.
constexpr int32_t decode_buffers(int32_t head_dim) {
  return head_dim > 128 ? 2 : 4;
}

// Rows of one sequence that attend together: all of a slice's new rows.
struct AttentionSlice {
  int32_t row;             // first row, index into q and out
  int32_t rows;            // at least 1
  int32_t position;        // of the first row in its sequence
  int32_t sequence;        // row of the block tables
  int32_t chunk_keys = 0;  // of AttentionSplit or KeyChunks; 0: the keys are not split
  bool is_decode = false;  // of AttentionSplit; only of at most kDecodeEntries entries
};

// One block's work for one KV head. The entries of a slice are its (row, query head of the group)
// pairs in that order, so that short slices and single rows fill a tile as well as long ones do.
struct AttentionTile {
  int32_t row;             // of the slice
  int32_t position;        // of the slice
  int32_t sequence;        // 1 + row of the block tables; 0: nothing to do (padding of the list)
  int32_t entry;           // first entry
  int32_t entries;         // of the whole slice: where the last tile ends
  int32_t chunk_keys = 0;  // 0: all keys; else those of one chunk, from chunk * chunk_keys on
  int32_t chunk = 0;
  int32_t partial = 0;    // the slice's first row of the partial results: one per chunk and entry
  int32_t is_decode = 0;  // 1: attention_decode_body.h computes it
};

struct AttentionArgs {
  const Bf16* q = nullptr;  // [rows, heads * head_dim], rotated, scaled by log2(e) / sqrt(head_dim)
  int64_t ld_q = 0;         // elements between rows, a multiple of 8
  Bf16* out = nullptr;      // [rows, heads * head_dim]
  int64_t ld_out = 0;
  CacheView cache = {};
  const int32_t* block_tables = nullptr;  // [sequences, block_table_stride]
  int64_t block_table_stride = 0;
  const AttentionTile* tiles = nullptr;  // [num_tiles]
  int32_t num_tiles = 0;
  int32_t rows = 0;  // of q and out, for launch_attention_hopper() alone
  // What follows is for tiles with chunks; num_merges 0: there are none.
  const AttentionTile* merges = nullptr;  // [num_merges] of attention_merges()
  int32_t num_merges = 0;
  int32_t num_blocks = 0;     // of threads, per KV head, that share launch_attention()'s tiles
  float* partials = nullptr;  // attention_partial_bytes()
  int32_t partial_rows = 0;   // that the partials have room for
  int32_t heads = 0;
  int32_t kv_heads = 0;  // a divisor of heads
  int32_t kv_begin = 0;  // KV heads [kv_begin, kv_end) and their query heads are computed
  int32_t kv_end = 0;
  int32_t head_dim = 0;  // one that has_attention_kernel()
  int32_t window = 0;    // keys a row may look back on, itself included; 0: all
  float softcap = 0;     // scores, in base 2, become cap * tanh(score / cap); 0: they stay
};

// Blocks of threads per KV head that share the tiles.
FP_HD int32_t num_blocks_of(const AttentionArgs& args) {
  return args.num_merges > 0 ? args.num_blocks : args.num_tiles;
}

// The tiles of some slices for heads_per_kv query heads per KV head, those with most keys first
// (the last blocks of a launch should be short ones). Throws std::invalid_argument for bad slices.
std::vector<AttentionTile> attention_tiles(std::span<const AttentionSlice> slices,
                                           int32_t heads_per_kv);

// The item, a tile for one query head, that a block of launch_attention_hopper() takes in its
// turn. Items are sorted, longest first, and every other turn goes backwards through the
// blocks: so their sums differ little.
FP_HD int32_t item_of_turn(int32_t turn, int32_t block, int32_t blocks) {
  return turn % 2 == 0 ? turn * blocks + block : (turn + 1) * blocks - 1 - block;
}

// Rows of a tile of launch_attention_hopper().
constexpr int32_t attention_rows_of_tile(int32_t head_dim) {
  return head_dim == 64 ? 192 : 128;
}

// The tiles of launch_attention_hopper(): entries are rows of every query head. Else as above; the
// rows of a slice with chunks all end in the same one. Those of one chunk are neighbours.
std::vector<AttentionTile> attention_row_tiles(std::span<const AttentionSlice> slices,
                                               int32_t head_dim);

// What that kernel makes of such a tile: of keys from first_key on, its row r sees those below
// q_tile * rows of a tile + r + 1 + keys - rows, and none beyond `keys`.
struct AttentionItem {
  int32_t q_tile;  // of the rows
  int32_t row;     // of those, the first: index into q and out
  int32_t rows;
  int32_t first_key;
  int32_t keys;
};

// A chunk that ends before the slice begins is seen whole: so is the last of `keys` by a row that
// counts as the last of 1.
FP_HD AttentionItem item_of_tile(const AttentionTile& tile, int32_t rows_of_tile) {
  const int32_t first_key = tile.chunk * tile.chunk_keys;
  if (tile.chunk_keys > 0 && first_key + tile.chunk_keys <= tile.position)
    return {0, tile.row + tile.entry, 1, first_key, tile.chunk_keys};
  return {tile.entry / rows_of_tile, tile.row, tile.entries, first_key,
          tile.position + tile.entries - first_key};
}

// Where the partial result of the tile's row for one query head of its group lies, as if its
// entries were (row, query head) pairs: where attention_merges() of those looks for it.
FP_HD int64_t partial_row_of(const AttentionTile& tile, int32_t row, int32_t head_in_group,
                             int32_t group) {
  return (tile.partial + int64_t{tile.chunk} * tile.entries + row) * group + head_in_group;
}

// Most tiles of those that `rows` rows of at most `sequences` sequences can need.
int32_t max_attention_row_tiles(int32_t rows, int32_t sequences, int32_t head_dim);

// Of the tiles of attention_tiles(), the first chunk of each 64 entries: what the partial results
// are merged by.
std::vector<AttentionTile> attention_merges(std::span<const AttentionTile> tiles);

// Rows of partial results that a slice takes.
int64_t partial_rows_of(const AttentionSlice& slice, int32_t heads_per_kv);

// Of the partial results of some KV heads: per row and query head's entry the output, not yet
// divided by its sum [partial_rows, kv_heads, head_dim], then maximum and sum of the exponentials
// [partial_rows, kv_heads, 2], all float.
size_t attention_partial_bytes(int64_t partial_rows, int32_t kv_heads, int32_t head_dim);

// Most tiles that `rows` rows of at most `sequences` sequences can need: what a captured graph's
// tile list is padded to.
int32_t max_attention_tiles(int32_t rows, int32_t sequences, int32_t heads_per_kv);

// Head sizes that there is a kernel for: 64, 96, 128 and 256.
bool has_attention_kernel(int32_t head_dim);

// Shared memory of one block.
size_t attention_shared_bytes(int32_t head_dim);

// Head sizes of launch_attention_hopper(): 64, 128 and 256; and sizes of the cache's blocks: powers
// of two from 8 on.
bool has_hopper_head_size(int32_t head_dim);
bool has_hopper_block_size(int32_t block_tokens);

// Throw std::invalid_argument naming the field, its value and what is allowed; check_rows() for
// launch_attention_hopper().
void check(const AttentionArgs& args);
void check_rows(const AttentionArgs& args);

}  // namespace flowprefill
