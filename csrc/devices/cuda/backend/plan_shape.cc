#include "devices/cuda/backend/plan_shape.h"

#include <algorithm>
#include <utility>

#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/sampling_params.h"

namespace flowprefill {
namespace {

constexpr size_t kAlignment = 256;

// Gives out one place after another.
class Arena {
 public:
  explicit Arena(size_t start = 0) : end_(start) {}

  size_t take(size_t bytes) {
    const size_t place = end_;
    end_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return place;
  }
  size_t end() const { return end_; }

 private:
  size_t end_;
};

size_t product(int64_t rows, int64_t columns, size_t element_bytes) {
  return static_cast<size_t>(rows) * static_cast<size_t>(columns) * element_bytes;
}

size_t different_windows(const ModelConfig& config) {
  std::vector<int32_t> windows = config.windows;
  std::ranges::sort(windows);
  return static_cast<size_t>(std::ranges::unique(windows).begin() - windows.begin());
}

// Where an operator's rows or columns lie in the lane.
class Ranges {
 public:
  Ranges(const PlanShape& shape, const Step& step) : s_(shape), c_(shape.config), step_(step) {}

  LiveRange hidden() const { return batch_rows(s_.lane.hidden, c_.hidden_size * 4); }
  LiveRange rotary() const { return batch_rows(s_.lane.rotary, c_.head_dim * 4); }
  LiveRange normed() const { return tile_rows(s_.lane.normed, c_.hidden_size * 2); }
  LiveRange context() const { return tile_rows(s_.lane.context, c_.q_columns() * 2); }
  LiveRange qkv() const { return tile_rows(s_.lane.qkv, c_.qkv_columns() * 2); }
  LiveRange q() const { return tile_rows(s_.lane.q, c_.q_columns() * 2); }
  LiveRange gated() const { return tile_rows(s_.lane.gated, c_.intermediate_size * 2); }
  LiveRange last() const { return {s_.lane.last, product(s_.sizes.sequences, c_.hidden_size, 2)}; }
  LiveRange tokens() const { return {s_.lane.tokens, product(s_.sizes.sequences, 1, 4)}; }
  LiveRange logits() const {
    return {s_.lane.logits, product(s_.sizes.sequences, s_.padded_vocab, 4)};
  }

  // Columns of the step's vocabulary blocks, in every row of the logits.
  LiveSet head_columns() const {
    const auto [begin, end] = head_column_range(s_.padded_vocab, step_);
    std::vector<LiveRange> ranges;
    ranges.reserve(static_cast<size_t>(s_.sizes.sequences));
    for (int32_t row = 0; row < s_.sizes.sequences; ++row) {
      ranges.push_back({s_.lane.logits + product(row, s_.padded_vocab, 4) + product(begin, 1, 4),
                        product(end - begin, 1, 4)});
    }
    return ranges;
  }

  LiveSet hidden_of(const std::vector<int32_t>& rows) const {
    const size_t bytes = product(1, c_.hidden_size, 4);
    if (rows.empty())
      return LiveSet({{s_.lane.hidden, product(s_.sizes.rows, 1, bytes)}});
    std::vector<LiveRange> ranges;
    ranges.reserve(rows.size());
    for (const int32_t row : rows)
      ranges.push_back({s_.lane.hidden + static_cast<size_t>(row) * bytes, bytes});
    return ranges;
  }

 private:
  LiveRange batch_rows(size_t start, int64_t row_bytes) const {
    return {start + product(step_.row_begin, row_bytes, 1),
            product(step_.row_end - step_.row_begin, row_bytes, 1)};
  }
  LiveRange tile_rows(size_t start, int64_t row_bytes) const {
    return {start + product(step_.row_begin - step_.base, row_bytes, 1),
            product(step_.row_end - step_.row_begin, row_bytes, 1)};
  }

  const PlanShape& s_;
  const ModelConfig& c_;
  const Step& step_;
};

SegmentAccess access_of(const Ranges& r, const PlanShape& shape, Op op, const Step& step,
                        const std::vector<int32_t>& last_rows) {
  switch (op) {
    case Op::kEmbed:
      return {.reads = {}, .writes = LiveSet({r.hidden(), r.rotary()})};
    case Op::kAttnNorm:
    case Op::kMlpNorm:
      return {.reads = LiveSet({r.hidden()}), .writes = LiveSet({r.normed()})};
    case Op::kQkv:
      return {.reads = LiveSet({r.normed()}), .writes = LiveSet({r.qkv()})};
    case Op::kRope:
      return {.reads = LiveSet({r.qkv(), r.rotary()}), .writes = LiveSet({r.q()})};
    case Op::kAttention:
      // It leaves out rows of padding: nobody reads these but for other padding.
      return {.reads = LiveSet({r.q()}), .writes = LiveSet({r.context()})};
    case Op::kOutput:
      return {.reads = LiveSet({r.context(), r.hidden()}), .writes = LiveSet({r.hidden()})};
    case Op::kGateUp:
      return {.reads = LiveSet({r.normed()}), .writes = LiveSet({r.gated()})};
    case Op::kDown:
      return {.reads = LiveSet({r.gated(), r.hidden()}), .writes = LiveSet({r.hidden()})};
    case Op::kFinalNorm:
      return {.reads = r.hidden_of(last_rows), .writes = LiveSet({r.last()})};
    case Op::kHead:
      break;
  }
  SegmentAccess head{.reads = LiveSet({r.last()}), .writes = r.head_columns()};
  if (!chooses_tokens(shape.config, step))
    return head;
  return joined(head, {.reads = LiveSet({r.logits()}), .writes = LiveSet({r.tokens()})});
}

}  // namespace

std::pair<int32_t, int32_t> head_column_range(int32_t padded_vocab, const Step& step) {
  return {step.row_begin * 64, std::min(step.row_end * 64, padded_vocab)};
}

bool chooses_tokens(const ModelConfig& config, const Step& step) {
  return step.last == Op::kHead && int64_t{step.row_end} * 64 >= config.vocab_size;
}

LaneLayout::LaneLayout(const ModelConfig& c, int32_t padded_vocab, const PlanSizes& sizes) {
  Arena lane;
  hidden = lane.take(product(sizes.rows, c.hidden_size, 4));
  rotary = lane.take(product(sizes.rows, c.head_dim, 4));
  normed = lane.take(product(sizes.tile_rows, std::max(c.hidden_size, c.q_columns()), 2));
  context = normed;
  Arena projections(lane.end());
  qkv = projections.take(product(sizes.tile_rows, c.qkv_columns(), 2));
  q = projections.take(product(sizes.tile_rows, c.q_columns(), 2));
  const size_t gated_bytes = product(sizes.tile_rows, c.intermediate_size, 2);
  gated = lane.take(std::max(projections.end() - qkv, gated_bytes));
  last = lane.take(product(sizes.sequences, c.hidden_size, 2));
  // Side by side, so that the result is one range.
  logits = lane.take(product(sizes.sequences, padded_vocab, 4) + product(sizes.sequences, 1, 4));
  tokens = logits + product(sizes.sequences, padded_vocab, 4);
  bytes = lane.end();
}

InputLayout::InputLayout(const ModelConfig& c, const PlanSizes& sizes,
                         const std::vector<AttentionRows>& attention) {
  Arena block;
  tokens = block.take(product(sizes.rows, 1, 4));
  sequences = block.take(product(sizes.rows, 1, 4));
  positions = block.take(product(sizes.rows, 1, 4));
  last_rows = block.take(product(sizes.sequences, 1, 4));
  block_tables = block.take(product(sizes.sequences, sizes.table_stride, 4));
  sampling = block.take(product(sizes.sequences, 1, sizeof(SamplingParams)));
  bytes = block.end();
  for (const AttentionRows& rows : attention) {
    num_tiles.push_back(
        max_attention_tiles(rows.end - rows.begin, sizes.sequences, c.num_heads / c.num_kv_heads));
    tiles.push_back(bytes);
    bytes += product(num_tiles.back(), 1, sizeof(AttentionTile));
  }
}

// Slices have at least one row each and leave at most one tile per row unfilled; layers of one
// window have the same slices.
size_t InputLayout::max_bytes(const ModelConfig& c, const PlanSizes& sizes) {
  const size_t without_tiles = InputLayout(c, sizes, {}).bytes;
  const int64_t entries = int64_t{sizes.rows} * (c.num_heads / c.num_kv_heads);
  const size_t tiles = product(entries / kAttentionEntries + sizes.rows, 1, sizeof(AttentionTile));
  return without_tiles + different_windows(c) * tiles;
}

PlanShape::PlanShape(const ModelConfig& model, int32_t vocab_rows, const PlanSizes& plan_sizes,
                     std::vector<AttentionRows> attention_rows)
    : config(model),
      padded_vocab(vocab_rows),
      sizes(plan_sizes),
      attention(std::move(attention_rows)),
      lane(model, vocab_rows, plan_sizes),
      inputs(model, plan_sizes, attention) {}

size_t PlanShape::attention_index(const Step& step) const {
  const AttentionRows rows{.begin = step.row_begin, .end = step.row_end, .base = step.base};
  return static_cast<size_t>(std::ranges::lower_bound(attention, rows) - attention.begin());
}

SegmentAccess joined(const SegmentAccess& first, const SegmentAccess& second) {
  return {.reads = first.reads.united(second.reads.without(first.writes)),
          .writes = first.writes.united(second.writes)};
}

SegmentAccess access_of(const PlanShape& shape, const Step& step,
                        const std::vector<int32_t>& last_rows) {
  const Ranges ranges(shape, step);
  SegmentAccess all;
  for (auto op = static_cast<uint8_t>(step.first); op <= static_cast<uint8_t>(step.last); ++op)
    all = joined(all, access_of(ranges, shape, static_cast<Op>(op), step, last_rows));
  return all;
}

}  // namespace flowprefill
