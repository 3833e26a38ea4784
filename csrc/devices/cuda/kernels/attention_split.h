// AttentionSplit: into how many chunks the keys of a sequence are split, so that few rows on a long
// context give work to every multiprocessor (flash-decoding). Asked by the CUDA backend per run,
// and per plan for how much room the lists and partial results need.
#pragma once

#include <cstdint>

namespace flowprefill {

// What the attention of some rows can need at most, whatever the lengths of their sequences.
struct AttentionNeeds {
  int32_t num_tiles = 0;
  int32_t num_merges = 0;        // 0: no keys are ever split
  int64_t partial_rows = 0;      // of all sequences together
  int64_t rows_of_sequence = 0;  // of these, of any one sequence
};

// Of one model on one card. Chunks depend on a sequence's own new rows and length: never on what it
// is batched with, nor on where a plan cuts its rows or heads, so its bits do not either.
struct AttentionSplit {
  static constexpr int32_t kLeastKeys = 192;    // of a chunk
  static constexpr int32_t kBlocksPerUnit = 2;  // blocks of threads that a multiprocessor holds

  int32_t multiprocessors = 0;  // 0: no keys are split
  int32_t heads_per_kv = 1;
  int32_t kv_heads = 1;

  // Keys of a chunk for a sequence of `rows` new rows and `keys` keys, the new ones included, both
  // at least 1; 0: its keys are not split, since there are enough blocks without or few keys.
  int32_t chunk_keys(int32_t rows, int32_t keys) const;

  // Whether such a sequence's warps take different keys of a tile (attention_decode_body.h).
  bool is_decode(int32_t rows) const;

  // For `rows` rows of at most `sequences` sequences with up to max_keys keys each.
  AttentionNeeds needs(int32_t rows, int32_t sequences, int32_t max_keys) const;

 private:
  int64_t num_tiles(int64_t rows) const;
  // At most that many chunks; 1: the keys are not split.
  int64_t max_chunks(int64_t rows, int32_t max_keys) const;
};

}  // namespace flowprefill
