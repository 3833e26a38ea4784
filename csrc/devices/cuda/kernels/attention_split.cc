#include "devices/cuda/kernels/attention_split.h"

#include <algorithm>

#include "devices/cuda/kernels/attention_args.h"

namespace flowprefill {
namespace {

constexpr int64_t ceil_div(int64_t count, int64_t by) {
  return (count + by - 1) / by;
}

}  // namespace

int64_t AttentionSplit::num_tiles(int64_t rows) const {
  return ceil_div(rows * heads_per_kv, kAttentionEntries);
}

int64_t AttentionSplit::max_chunks(int64_t rows, int32_t max_keys) const {
  const int64_t blocks = num_tiles(rows) * kv_heads;
  if (blocks >= multiprocessors || max_keys < 2 * kLeastKeys)
    return 1;
  return std::min(ceil_div(int64_t{kBlocksPerUnit} * multiprocessors, blocks),
                  ceil_div(max_keys, kLeastKeys));
}

int32_t AttentionSplit::chunk_keys(int32_t rows, int32_t keys) const {
  const int64_t chunks = max_chunks(rows, keys);
  if (chunks == 1)
    return 0;
  const int64_t step = ceil_div(ceil_div(keys, chunks), kChunkStep) * kChunkStep;
  return static_cast<int32_t>(std::max<int64_t>(step, kLeastKeys));
}

bool AttentionSplit::is_decode(int32_t rows) const {
  return int64_t{rows} * heads_per_kv <= kDecodeEntries;  // `return false`: never
}

// Fewer rows have no more chunks each than one row has, and no sequence more than the worst number
// of rows has.
AttentionNeeds AttentionSplit::needs(int32_t rows, int32_t sequences, int32_t max_keys) const {
  int64_t most_tiles = 0;
  int64_t most_partial = 0;
  int64_t most_merges = 0;
  for (int64_t r = 1; r <= rows; ++r) {
    const int64_t chunks = max_chunks(r, max_keys);
    if (chunks == 1)
      break;  // so have more rows
    most_tiles = std::max(most_tiles, num_tiles(r) * chunks);
    most_partial = std::max(most_partial, r * heads_per_kv * chunks);
    most_merges = std::max(most_merges, num_tiles(r));
  }
  const int64_t whole = max_attention_tiles(rows, sequences, heads_per_kv);
  const int64_t of_a_row = max_chunks(1, max_keys);
  const int64_t count = std::min(rows, sequences);
  return {.num_tiles = static_cast<int32_t>(
              whole + std::min(rows * num_tiles(1) * of_a_row, count * most_tiles)),
          .num_merges = static_cast<int32_t>(std::min(whole, count * most_merges)),
          .partial_rows = most_partial == 0
                              ? 0
                              : std::min(rows * heads_per_kv * of_a_row, count * most_partial),
          .rows_of_sequence = most_partial};
}

}  // namespace flowprefill
