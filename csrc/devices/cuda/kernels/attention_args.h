// AttentionArgs, AttentionTile: causal attention of ragged rows over the paged KV cache, cut into
// tiles. Tiles are made on the host per run (attention_tiles), uploaded, and read by the kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "devices/cuda/kernels/batch_view.h"

namespace flowprefill {

constexpr int32_t kAttentionEntries = 64;  // (row, query head) pairs of one tile
constexpr int32_t kAttentionKeys = 64;     // keys that a tile takes at once

// Rows of one sequence that attend together: all of a slice's new rows.
struct AttentionSlice {
  int32_t row;       // first row, index into q and out
  int32_t rows;      // at least 1
  int32_t position;  // of the first row in its sequence
  int32_t sequence;  // row of the block tables
};

// One block's work for one KV head. The entries of a slice are its (row, query head of the group)
// pairs in that order, so that short slices and single rows fill a tile as well as long ones do.
struct AttentionTile {
  int32_t row;       // of the slice
  int32_t position;  // of the slice
  int32_t sequence;  // 1 + row of the block tables; 0: nothing to do (padding of the list)
  int32_t entry;     // first entry
  int32_t entries;   // of the whole slice: where the last tile ends
};

struct AttentionArgs {
  const Bf16* q = nullptr;  // [rows, heads * head_dim], rotated, scaled by log2(e) / sqrt(head_dim)
  int64_t ld_q = 0;         // elements between rows, even
  Bf16* out = nullptr;      // [rows, heads * head_dim]
  int64_t ld_out = 0;
  CacheView cache = {};
  const int32_t* block_tables = nullptr;  // [sequences, block_table_stride]
  int64_t block_table_stride = 0;
  const AttentionTile* tiles = nullptr;  // [num_tiles]
  int32_t num_tiles = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;  // a divisor of heads
  int32_t head_dim = 0;  // 64, 96 or 128
  int32_t window = 0;    // keys a row may look back on, itself included; 0: all
};

// The tiles of some slices for heads_per_kv query heads per KV head, those with most keys first
// (the last blocks of a launch should be short ones). Throws std::invalid_argument for bad slices.
std::vector<AttentionTile> attention_tiles(std::span<const AttentionSlice> slices,
                                           int32_t heads_per_kv);

// Most tiles that `rows` rows of at most `sequences` sequences can need: what a captured graph's
// tile list is padded to.
int32_t max_attention_tiles(int32_t rows, int32_t sequences, int32_t heads_per_kv);

// Shared memory of one block.
size_t attention_shared_bytes(int32_t head_dim);

// Throws std::invalid_argument naming the field, its value and what is allowed.
void check(const AttentionArgs& args);

}  // namespace flowprefill
