#include "devices/cuda/backend/batch_inputs.h"

#include <algorithm>
#include <cstring>

#include "devices/cuda/kernels/attention_args.h"

namespace flowprefill {
namespace {

// Writes into the block; offsets come from the layout.
class Writer {
 public:
  explicit Writer(std::vector<std::byte>& bytes) : bytes_(bytes) {}

  template <typename T>
  void put(size_t offset, size_t index, const T& value) {
    std::memcpy(bytes_.data() + offset + index * sizeof(T), &value, sizeof(T));
  }
  template <typename T>
  void put_all(size_t offset, std::span<const T> values) {
    if (!values.empty())
      std::memcpy(bytes_.data() + offset, values.data(), values.size_bytes());
  }

 private:
  std::vector<std::byte>& bytes_;
};

// What of the sequences lies in the rows, by the kernel that computes it. Their keys are split, and
// the kernels chosen, by the sequences' own sizes.
struct Slices {
  std::vector<AttentionSlice> portable = {};
  std::vector<AttentionSlice> hopper = {};
  std::vector<AttentionSlice> chunked = {};  // hopper's, with chunks
};

// Takes the first rows of a slice away from it.
AttentionSlice first_rows_of(AttentionSlice& slice, int32_t rows) {
  AttentionSlice first = slice;
  first.rows = std::min(slice.rows, rows);
  slice.row += first.rows;
  slice.position += first.rows;
  slice.rows -= first.rows;
  return first;
}

Slices slices_in(const Batch& batch, const AttentionRows& rows, const AttentionRules& rules) {
  Slices slices;
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const Sequence& s = batch.sequences[i];
    const int32_t begin = std::max(rows.begin, s.row_begin);
    const int32_t end = std::min(rows.end, s.row_end());
    if (begin >= end)
      continue;
    AttentionSlice slice{.row = begin - rows.base,
                         .rows = end - begin,
                         .position = s.context + begin - s.row_begin,
                         .sequence = static_cast<int32_t>(i)};
    if (rules.is_for_hopper(s.rows)) {
      for (const AttentionSlice& part :
           row_slices(slice, rows.is_windowed ? KeyChunks{} : rules.chunks))
        (part.chunk_keys > 0 ? slices.chunked : slices.hopper).push_back(part);
      continue;
    }
    slice.chunk_keys = rules.split.chunk_keys(s.rows, s.length());
    slice.is_decode = rules.split.is_decode(s.rows);
    slices.portable.push_back(slice);
  }
  return slices;
}

// How many of the slices, from the first on, have room for their partial results in one launch.
size_t slices_of_launch(std::span<const AttentionSlice> slices, int64_t room, int32_t group) {
  size_t count = 0;
  for (; count < slices.size(); ++count) {
    room -= partial_rows_of(slices[count], group);
    if (room < 0)
      break;
  }
  return count;
}

// Takes so many rows away from the slices.
std::vector<AttentionSlice> first_rows(std::span<AttentionSlice>& slices, int32_t rows) {
  std::vector<AttentionSlice> first;
  while (rows > 0 && !slices.empty()) {
    first.push_back(first_rows_of(slices.front(), rows));
    rows -= first.back().rows;
    if (slices.front().rows == 0)
      slices = slices.subspan(1);
  }
  return first;
}

// Tiles of Hopper's kernel are those of whole rows; what its partial results are merged by, of
// (row, query head) pairs.
void put_row_tiles(Writer& out, const PlanShape& shape, const AttentionLaunches& launches,
                   Slices slices) {
  std::span<AttentionSlice> rest = slices.chunked;
  for (const AttentionLists& lists : launches.row_lists) {
    const std::vector<AttentionSlice> chunked = first_rows(rest, launches.chunked_rows);
    slices.hopper.insert(slices.hopper.end(), chunked.begin(), chunked.end());
    out.put_all<AttentionTile>(lists.tiles,
                               attention_row_tiles(slices.hopper, shape.rules.head_dim));
    out.put_all<AttentionTile>(
        lists.merges, attention_merges(attention_tiles(chunked, shape.rules.split.heads_per_kv)));
    slices.hopper.clear();
  }
}

void put_tiles(Writer& out, const PlanShape& shape, const Batch& batch) {
  const int32_t group = shape.graph.attention.heads_per_kv();
  for (size_t i = 0; i < shape.attention.size(); ++i) {
    const Slices all = slices_in(batch, shape.attention[i], shape.rules);
    std::span<const AttentionSlice> rest = all.portable;
    const AttentionLaunches& launches = shape.inputs.attention[i];
    put_row_tiles(out, shape, launches, all);
    for (const AttentionLists& lists : launches.lists) {
      const size_t count = slices_of_launch(rest, launches.partial_rows, group);
      const std::vector<AttentionTile> tiles = attention_tiles(rest.first(count), group);
      out.put_all<AttentionTile>(lists.tiles, tiles);
      out.put_all<AttentionTile>(lists.merges, attention_merges(tiles));
      rest = rest.subspan(count);
    }
  }
}

void put_sequence(Writer& out, const InputLayout& layout, const Batch& batch, size_t index,
                  int32_t block_tokens) {
  const Sequence& s = batch.sequences[index];
  for (int32_t row = 0; row < s.rows; ++row) {
    const auto at = static_cast<size_t>(s.row_begin) + static_cast<size_t>(row);
    out.put(layout.sequences, at, static_cast<int32_t>(index) + 1);
    out.put(layout.positions, at, s.context + row);
  }
  out.put(layout.last_rows, index, s.row_end() - 1);
  out.put(layout.next_tokens, index, s.next_token);
  const size_t table = index * static_cast<size_t>(layout.table_stride) * sizeof(int32_t);
  const auto used = static_cast<size_t>(blocks_of(s.length(), block_tokens));
  out.put_all<int32_t>(layout.block_tables + table, std::span(s.block_table).first(used));
}

}  // namespace

std::vector<AttentionSlice> row_slices(AttentionSlice slice, const KeyChunks& chunks) {
  std::vector<AttentionSlice> parts;
  while (slice.rows > 0) {
    const int32_t position = slice.position;
    parts.push_back(first_rows_of(slice, chunks.end_at(position) - position));
    parts.back().chunk_keys = chunks.keys_at(position);
  }
  return parts;
}

int32_t longest_table(const Batch& batch, int32_t block_tokens) {
  int32_t longest = 0;
  for (const Sequence& s : batch.sequences)
    longest = std::max(longest, blocks_of(s.length(), block_tokens));
  return longest;
}

std::vector<std::byte> batch_inputs(const PlanShape& shape, const Batch& batch,
                                    std::span<const SamplingParams> sampling) {
  const InputLayout& layout = shape.inputs;
  std::vector<std::byte> bytes(layout.bytes);
  Writer out(bytes);
  out.put_all<int32_t>(layout.tokens, batch.tokens);
  for (size_t i = 0; i < static_cast<size_t>(shape.sizes().sequences); ++i) {
    out.put(layout.last_rows, i, int32_t{-1});
    out.put(layout.next_tokens, i, int32_t{-1});
  }
  for (size_t i = 0; i < batch.sequences.size(); ++i)
    put_sequence(out, layout, batch, i, shape.rules.block_tokens);
  out.put_all(layout.sampling, sampling);
  put_tiles(out, shape, batch);
  return bytes;
}

}  // namespace flowprefill
