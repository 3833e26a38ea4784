#include "graph/key_chunks.h"

#include <algorithm>

namespace flowprefill {
namespace {

constexpr int32_t kMostChunks = 16;  // with more, chunks would be shorter than the rows that share

int64_t ceil_div(int64_t count, int64_t by) {
  return (count + by - 1) / by;
}

}  // namespace

KeyChunks KeyChunks::of(int32_t heads, int32_t multiprocessors) {
  KeyChunks chunks;
  if (multiprocessors > 0)
    chunks.count = std::clamp(multiprocessors / heads, 1, kMostChunks);
  return chunks;
}

// Equal chunks of all that the last of the rows that share them sees.
int32_t KeyChunks::keys_at(int32_t position) const {
  if (!has_any(int64_t{position} + 1))
    return 0;
  const int64_t keys = (int64_t{position} / rows + 1) * rows;
  return static_cast<int32_t>(ceil_div(ceil_div(keys, count_at(position)), step) * step);
}

int32_t KeyChunks::count_at(int32_t position) const {
  if (!has_any(int64_t{position} + 1))
    return 1;
  const int64_t keys = (int64_t{position} / rows + 1) * rows;
  return static_cast<int32_t>(count * ceil_div(keys, int64_t{count} * most_keys));
}

int32_t KeyChunks::end_at(int32_t position) const {
  const int64_t keys = keys_at(position);
  if (keys == 0)
    return count > 0 ? from : INT32_MAX;
  const int64_t next_rows = (int64_t{position} / rows + 1) * rows;
  const int64_t next_chunk = (position / keys + 1) * keys;
  return static_cast<int32_t>(std::min<int64_t>({next_rows, next_chunk, INT32_MAX}));
}

}  // namespace flowprefill
