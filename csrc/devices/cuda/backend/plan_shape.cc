#include "devices/cuda/backend/plan_shape.h"

#include <algorithm>
#include <set>
#include <utility>

#include "devices/cuda/backend/operator_fusion.h"
#include "devices/cuda/kernels/attention_args.h"
#include "graph/sampling_params.h"

namespace flowprefill {
namespace {

constexpr size_t kAlignment = 256;
constexpr int64_t kPartialBytes = int64_t{256}
                                  << 20;  // of one launch, unless one sequence has more
constexpr int32_t kRowStep = 384;         // rows of whole tiles, whatever the head size

// Gives out one place after another.
class Arena {
 public:
  size_t take(int64_t count, size_t element_bytes) {
    const size_t place = end_;
    const size_t bytes = static_cast<size_t>(count) * element_bytes;
    end_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return place;
  }
  size_t end() const { return end_; }

 private:
  size_t end_ = 0;
};

size_t different_windows(const ModelGraph& graph) {
  std::set<int32_t> windows;
  for (const Operator& op : graph.operators) {
    if (op.kind == OperatorKind::kAttention)
      windows.insert(op.window);
  }
  return windows.size();
}

// Each tile of a chunk has partial results of its own, of a whole row's entries at least, or of 64.
int32_t tiles_of_launch(const AttentionNeeds& needs, int32_t whole, const AttentionRules& rules) {
  const int32_t entries = std::min(rules.split.heads_per_kv, kAttentionEntries / 2);
  const int64_t chunks = rules.partial_rows(needs) / entries;
  return static_cast<int32_t>(std::min<int64_t>(needs.num_tiles, whole + chunks));
}

// What so many rows with chunks can need at most. The rows of KeyChunks::rows positions are parted
// once, where a chunk ends; those of a sequence begin and end anywhere.
struct ChunkedNeeds {
  int64_t num_tiles = 0;
  int64_t num_merges = 0;
};

ChunkedNeeds needs_of(int64_t chunked_rows, int64_t sequences, const AttentionRules& rules,
                      int32_t table_stride) {
  const int64_t unfilled = 2 * (chunked_rows / rules.chunks.rows) + 4 * sequences;
  const int64_t slices = std::min(chunked_rows, unfilled);
  const int64_t tiles = chunked_rows / attention_rows_of_tile(rules.head_dim) + slices;
  const int64_t entries = chunked_rows * rules.split.heads_per_kv;
  return {.num_tiles = tiles * rules.most_chunks(table_stride),
          .num_merges = entries / kAttentionEntries + slices};
}

}  // namespace

LayoutRules lane_rules(const ModelGraph& graph) {
  return {.elements = {.activation = 2, .product = 2},
          .alignment = kAlignment,
          .logits_stride = static_cast<int32_t>(padded_to_8(graph.vocab_size)),
          .last_of_kernel = last_of_kernel};
}

AttentionRules::AttentionRules(const ModelGraph& graph, int32_t multiprocessors,
                               int32_t tokens_per_block, bool has_hopper)
    : split{.multiprocessors = multiprocessors,
            .heads_per_kv = graph.attention.heads_per_kv(),
            .kv_heads = graph.attention.kv_heads},
      head_dim(graph.attention.head_dim),
      block_tokens(tokens_per_block),
      uses_hopper(has_hopper && has_hopper_block_size(tokens_per_block)) {
  if (!uses_hopper)
    return;
  chunks = KeyChunks::of(graph.attention.heads, multiprocessors);
  chunks.step = std::max(kRowChunkStep, tokens_per_block);
}

AttentionNeeds AttentionRules::needs(int32_t rows, int32_t sequences, int32_t table_stride) const {
  const int64_t keys = int64_t{table_stride} * block_tokens;
  return split.needs(rows, sequences, static_cast<int32_t>(std::min<int64_t>(keys, INT32_MAX)));
}

int64_t AttentionRules::partial_rows(const AttentionNeeds& needs) const {
  const auto row_bytes = static_cast<int64_t>(attention_partial_bytes(1, split.kv_heads, head_dim));
  return std::min(needs.partial_rows,
                  std::max(kPartialBytes / row_bytes, 2 * needs.rows_of_sequence));
}

// A launch ends where the next sequence does not fit, so each but the last is filled but for less
// than one sequence's rows.
int32_t AttentionRules::num_launches(const AttentionNeeds& needs) const {
  const int64_t room = partial_rows(needs);
  if (needs.partial_rows <= room)
    return 1;
  const int64_t filled = room - needs.rows_of_sequence;
  return static_cast<int32_t>((needs.partial_rows + filled - 1) / filled);
}

size_t AttentionRules::scratch_bytes(const AttentionNeeds& needs) const {
  return attention_partial_bytes(partial_rows(needs), split.kv_heads, head_dim);
}

int32_t AttentionRules::most_chunks(int32_t table_stride) const {
  const int64_t keys = int64_t{table_stride} * block_tokens;
  return chunks.count_at(static_cast<int32_t>(std::min<int64_t>(keys, INT32_MAX) - 1));
}

int32_t AttentionRules::chunked_rows(int32_t rows, int32_t table_stride) const {
  if (most_chunks(table_stride) == 1)
    return 0;
  const auto bytes = static_cast<int64_t>(scratch_bytes_of(kRowStep, table_stride));
  const int64_t steps = std::max<int64_t>(kPartialBytes / bytes, 1);
  return static_cast<int32_t>(std::min<int64_t>(rows, steps * kRowStep));
}

size_t AttentionRules::most_scratch_bytes_of(int64_t rows, int32_t table_stride) const {
  if (most_chunks(table_stride) == 1)
    return 0;
  const size_t limit = std::max(size_t{kPartialBytes}, scratch_bytes_of(kRowStep, table_stride));
  return std::min(scratch_bytes_of(rows, table_stride), limit);
}

int64_t AttentionRules::partial_rows_of(int64_t chunked_rows, int32_t table_stride) const {
  return chunked_rows * split.heads_per_kv * most_chunks(table_stride);
}

size_t AttentionRules::scratch_bytes_of(int64_t chunked_rows, int32_t table_stride) const {
  return attention_partial_bytes(partial_rows_of(chunked_rows, table_stride), split.kv_heads,
                                 head_dim);
}

size_t AttentionLaunches::num_kernels() const {
  size_t count = 0;
  for (const auto* of_kernel : {&row_lists, &lists}) {
    for (const AttentionLists& list : *of_kernel)
      count += list.num_merges > 0 ? 2 : 1;
  }
  return count;
}

InputLayout::InputLayout(const PlanSizes& sizes, int32_t stride, const AttentionRules& rules,
                         const std::vector<AttentionRows>& all_rows)
    : table_stride(stride) {
  Arena block;
  tokens = block.take(sizes.rows, sizeof(int32_t));
  sequences = block.take(sizes.rows, sizeof(int32_t));
  positions = block.take(sizes.rows, sizeof(int32_t));
  last_rows = block.take(sizes.sequences, sizeof(int32_t));
  next_tokens = block.take(sizes.sequences, sizeof(int32_t));
  block_tables = block.take(int64_t{sizes.sequences} * stride, sizeof(int32_t));
  sampling = block.take(sizes.sequences, sizeof(SamplingParams));
  bytes = block.end();
  for (const AttentionRows& rows : all_rows) {
    const int32_t count = rows.end - rows.begin;
    const AttentionNeeds needs = rules.needs(count, sizes.sequences, stride);
    AttentionLaunches launches{.lists = {},
                               .partial_rows = static_cast<int32_t>(rules.partial_rows(needs)),
                               .row_lists = {}};
    if (rules.is_for_hopper(sizes.rows))  // else no sequence has rows enough
      add_row_lists(launches, rows, sizes.sequences, rules);
    const int32_t whole = max_attention_tiles(count, sizes.sequences, rules.split.heads_per_kv);
    for (int32_t i = 0; i < rules.num_launches(needs); ++i) {
      const int32_t num_tiles = tiles_of_launch(needs, whole, rules);
      launches.lists.push_back({.tiles = take_tiles(num_tiles),
                                .merges = take_tiles(needs.num_merges),
                                .num_tiles = num_tiles,
                                .num_merges = needs.num_merges,
                                .num_whole = whole});
    }
    attention.push_back(std::move(launches));
  }
}

size_t InputLayout::take_tiles(int32_t count) {
  const size_t place = bytes;
  bytes += static_cast<size_t>(count) * sizeof(AttentionTile);
  return place;
}

// One launch, unless more rows have chunks than there is room for their partial results; the first
// has the rows without chunks too.
void InputLayout::add_row_lists(AttentionLaunches& launches, const AttentionRows& rows,
                                int32_t most_sequences, const AttentionRules& rules) {
  const int32_t count = rows.end - rows.begin;
  const int32_t chunked = rows.is_windowed ? 0 : rules.chunked_rows(count, table_stride);
  const ChunkedNeeds needs = needs_of(chunked, most_sequences, rules, table_stride);
  int32_t num_whole = max_attention_row_tiles(count, most_sequences, rules.head_dim);
  launches.chunked_rows = chunked;
  launches.row_partial_rows = static_cast<int32_t>(rules.partial_rows_of(chunked, table_stride));
  for (int32_t left = count; left > 0; left -= chunked == 0 ? count : chunked) {
    const auto num_tiles = static_cast<int32_t>(num_whole + needs.num_tiles);
    const auto num_merges = static_cast<int32_t>(needs.num_merges);
    launches.row_lists.push_back({.tiles = take_tiles(num_tiles),
                                  .merges = take_tiles(num_merges),
                                  .num_tiles = num_tiles,
                                  .num_merges = num_merges});
    num_whole = 0;
  }
}

// Layers of one window have the same slices. Those have at least one row each, leave at most one
// tile per row unfilled, and a row alone has the most chunks. The lists of several launches are at
// most three times as long together as that of one: see num_launches() and tiles_of_launch(); those
// of Hopper's kernel have room for less than twice the rows.
size_t InputLayout::max_bytes(const ModelGraph& graph, const PlanSizes& sizes, int32_t table_stride,
                              const AttentionRules& rules) {
  const size_t without_lists = InputLayout(sizes, table_stride, rules, {}).bytes;
  const AttentionNeeds all = rules.needs(sizes.rows, sizes.sequences, table_stride);
  const int64_t launches = rules.num_launches(all);
  const int64_t entries = int64_t{sizes.rows} * graph.attention.heads_per_kv();
  const int64_t whole = entries / kAttentionEntries + sizes.rows;
  const int64_t chunks = sizes.rows * int64_t{rules.needs(1, 1, table_stride).num_tiles};
  const int64_t merges = all.num_merges == 0 ? 0 : whole;
  const int64_t chunked = rules.chunked_rows(sizes.rows, table_stride) == 0 ? 0 : 2 * sizes.rows;
  const ChunkedNeeds of_chunked = needs_of(chunked, chunked, rules, table_stride);
  const int64_t row_tiles = rules.uses_hopper
                                ? max_attention_row_tiles(sizes.rows, sizes.rows, rules.head_dim) +
                                      of_chunked.num_tiles + of_chunked.num_merges
                                : 0;
  const auto tiles = static_cast<size_t>(launches * (whole + merges) +
                                         std::min<int64_t>(launches, 3) * chunks + row_tiles);
  return without_lists + different_windows(graph) * tiles * sizeof(AttentionTile);
}

PlanShape::PlanShape(const ModelGraph& model, const PlanSizes& sizes, int32_t table_stride,
                     const AttentionRules& attention_rules,
                     std::vector<AttentionRows> attention_rows)
    : graph(model),
      rules(attention_rules),
      attention(std::move(attention_rows)),
      lane(model, lane_rules(model), sizes),
      inputs(sizes, table_stride, rules, attention) {}

size_t PlanShape::scratch_bytes() const {
  const int32_t stride = inputs.table_stride;
  const AttentionNeeds needs = rules.needs(sizes().rows, sizes().sequences, stride);
  return std::max(rules.scratch_bytes(needs), rules.most_scratch_bytes_of(sizes().rows, stride));
}

size_t PlanShape::attention_index(const Step& step, const Operator& op) const {
  const AttentionRows rows = rules.rows_of(step, op, inputs.table_stride);
  return static_cast<size_t>(std::ranges::lower_bound(attention, rows) - attention.begin());
}

}  // namespace flowprefill
