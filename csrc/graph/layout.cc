#include "graph/layout.h"

#include <algorithm>
#include <numeric>

namespace flowprefill {
namespace {

// So many rows of a tile are a multiple of 256 bytes where a row is one of 16.
constexpr size_t kWholeRows = 16;

size_t rounded_up(size_t bytes, size_t alignment) {
  return (bytes + alignment - 1) / alignment * alignment;
}

int32_t rows_of(Extent extent, const PlanSizes& sizes) {
  switch (extent) {
    case Extent::kPrompt:
      return sizes.rows;
    case Extent::kTile:
      return sizes.tile_rows;
    case Extent::kHeadTile:
      return sizes.head_tile_rows;
    case Extent::kSequence:
      break;
  }
  return sizes.sequences;
}

bool is_result_of(const ModelGraph& graph, size_t tensor) {
  return (graph.results() >> tensor & 1) != 0;
}

// Operators of a layer during which each tensor holds something: one bit an operator, from the one
// that writes it to the last that reads that, or the last of that one's kernel.
std::vector<std::vector<bool>> lifetimes(const ModelGraph& graph, const LayoutRules& rules,
                                         ModelGraph::Range layer) {
  const auto count = static_cast<size_t>(layer.end - layer.begin);
  std::vector<std::vector<bool>> alive(graph.tensors.size(), std::vector<bool>(count, false));
  std::vector<int32_t> since(graph.tensors.size(), -1);
  for (int32_t i = layer.begin; i < layer.end; ++i) {
    const Operator& op = graph.op(i);
    const int32_t last = rules.last_of_kernel == nullptr ? i : rules.last_of_kernel(graph, i);
    const int32_t end = std::min(last + 1, layer.end) - layer.begin;
    for (const int32_t read : tensors_read(op)) {
      if (read < 0 || since[static_cast<size_t>(read)] < 0)
        continue;
      auto& bits = alive[static_cast<size_t>(read)];
      std::fill(bits.begin() + since[static_cast<size_t>(read)], bits.begin() + end, true);
    }
    since[static_cast<size_t>(op.output)] = i - layer.begin;
    alive[static_cast<size_t>(op.output)][static_cast<size_t>(i - layer.begin)] = true;
  }
  return alive;
}

bool overlap(const std::vector<bool>& a, const std::vector<bool>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] && b[i])
      return true;
  }
  return false;
}

// conflicts[a][b]: whether in some layer, or behind them, both hold something at once.
std::vector<std::vector<bool>> conflicts_of(const ModelGraph& graph, const LayoutRules& rules) {
  const size_t n = graph.tensors.size();
  std::vector<std::vector<bool>> conflicts(n, std::vector<bool>(n, false));
  const auto add = [&](ModelGraph::Range range) {
    const auto alive = lifetimes(graph, rules, range);
    for (size_t a = 0; a < n; ++a) {
      for (size_t b = 0; b < n; ++b)
        conflicts[a][b] = conflicts[a][b] || overlap(alive[a], alive[b]);
    }
  };
  for (int32_t layer = 0; layer < graph.num_layers; ++layer)
    add(graph.layer(layer));
  add(graph.rows_after_layers());
  return conflicts;
}

}  // namespace

bool holds_logits(const ModelGraph& graph, int32_t tensor) {
  return tensor == graph.logits() ||
         std::ranges::any_of(graph.operators, [tensor](const Operator& op) {
           return op.kind == OperatorKind::kScore && op.input == tensor;
         });
}

Layout::Layout(const ModelGraph& graph, const LayoutRules& rules, const PlanSizes& sizes)
    : sizes_(sizes), places_(graph.tensors.size()) {
  for (size_t i = 0; i < places_.size(); ++i) {
    const Tensor& tensor = graph.tensors[i];
    const bool is_logits = holds_logits(graph, static_cast<int32_t>(i));
    places_[i].element_bytes = static_cast<size_t>(rules.elements.of(tensor.type));
    places_[i].stride = is_logits && rules.logits_stride > 0 ? rules.logits_stride : tensor.columns;
    places_[i].rows = rows_of(tensor.extent, sizes);
  }
  const auto place = [&](size_t i) {
    places_[i].offset = bytes_;
    bytes_ += rounded_up(places_[i].bytes(), rules.alignment);
  };
  for (size_t i = 0; i < places_.size(); ++i) {
    const Extent extent = graph.tensors[i].extent;
    const bool is_result = is_result_of(graph, i);
    if (!is_result && (extent == Extent::kPrompt || extent == Extent::kSequence))
      place(i);
  }
  place_tile_tensors(graph, rules);
  place_result(graph);
  bytes_ = rounded_up(bytes_, rules.alignment);
}

// Largest first, each at the lowest place where it meets none that it conflicts with. Of so many
// rows that they end where others may start: so more rows only move all places further apart, and
// what fits between two at some number of rows does at every other.
void Layout::place_tile_tensors(const ModelGraph& graph, const LayoutRules& rules) {
  const auto conflicts = conflicts_of(graph, rules);
  const auto bytes_of = [](const Place& place) {
    return place.row_bytes() * rounded_up(static_cast<size_t>(place.rows), kWholeRows);
  };
  std::vector<size_t> order;
  for (size_t i = 0; i < places_.size(); ++i) {
    if (is_of_tile(graph.tensors[i].extent))
      order.push_back(i);
  }
  std::ranges::sort(order, [&](size_t a, size_t b) {
    return std::pair(bytes_of(places_[b]), a) < std::pair(bytes_of(places_[a]), b);
  });
  const size_t start = bytes_;
  std::vector<size_t> placed;
  for (const size_t i : order) {
    Place& mine = places_[i];
    mine.offset = start;
    std::ranges::sort(placed, {}, [this](size_t other) { return places_[other].offset; });
    for (const size_t other : placed) {
      const Place& theirs = places_[other];
      const bool meets = mine.offset < theirs.offset + bytes_of(theirs) &&
                         theirs.offset < mine.offset + bytes_of(mine);
      if (conflicts[i][other] && meets)
        mine.offset = rounded_up(theirs.offset + bytes_of(theirs), rules.alignment);
    }
    placed.push_back(i);
    bytes_ = std::max(bytes_, rounded_up(mine.offset + bytes_of(mine), rules.alignment));
  }
}

void Layout::place_result(const ModelGraph& graph) {
  result_.offset = bytes_;
  for (size_t i = 0; i < places_.size(); ++i) {
    if (!is_result_of(graph, i))
      continue;
    places_[i].offset = bytes_;
    bytes_ += places_[i].bytes();
  }
  result_.bytes = bytes_ - result_.offset;
}

LiveRange Layout::rows(int32_t tensor, int32_t begin, int32_t end) const {
  const Place& place = places_[static_cast<size_t>(tensor)];
  return {place.offset + static_cast<size_t>(begin) * place.row_bytes(),
          static_cast<size_t>(end - begin) * place.row_bytes()};
}

LiveRange Layout::all(int32_t tensor) const {
  return rows(tensor, 0, places_[static_cast<size_t>(tensor)].rows);
}

namespace {

// Where the rows of a step lie in the tensors of its operators.
class Access {
 public:
  Access(const ModelGraph& graph, const Layout& layout, const Step& step,
         const std::vector<int32_t>& last_rows)
      : g_(graph), layout_(layout), step_(step), last_rows_(last_rows) {}

  SegmentAccess of(const Operator& op) const {
    LiveSet reads;
    if (op.input >= 0)
      reads = g_.is_gather(op) ? gathered(op.input) : LiveSet({rows(op.input)});
    if (op.rotary >= 0)
      reads = reads.united(LiveSet({rows(op.rotary)}));
    if (op.route >= 0)
      reads = reads.united(LiveSet({rows(op.route)}));
    const LiveSet writes({rows(op.output)});
    const bool starts_pool = op.kind == OperatorKind::kPool && step_.row_begin == 0;
    // A part leaves the other columns of its rows: the first part makes all that was there dead,
    // the others keep it. So a part has one range, not one for each row.
    const bool keeps_parts = !step_.is_whole() && step_.part_begin > 0;
    if ((reads_output(op) && !starts_pool) || keeps_parts)
      reads = reads.united(writes);
    return {.reads = std::move(reads), .writes = writes};
  }

 private:
  LiveSet gathered(int32_t tensor) const {
    if (last_rows_.empty())
      return LiveSet({layout_.all(tensor)});
    std::vector<LiveRange> ranges;
    ranges.reserve(last_rows_.size());
    for (const int32_t row : last_rows_)
      ranges.push_back(layout_.rows(tensor, row, row + 1));
    return ranges;
  }

  LiveRange rows(int32_t tensor) const {
    switch (g_.tensor(tensor).extent) {
      case Extent::kPrompt:
        return layout_.rows(tensor, step_.row_begin, step_.row_end);
      case Extent::kTile:
      case Extent::kHeadTile:
        return layout_.rows(tensor, step_.row_begin - step_.base, step_.row_end - step_.base);
      case Extent::kSequence:
        break;
    }
    return layout_.all(tensor);
  }

  const ModelGraph& g_;
  const Layout& layout_;
  const Step& step_;
  const std::vector<int32_t>& last_rows_;
};

}  // namespace

SegmentAccess joined(const SegmentAccess& first, const SegmentAccess& second) {
  return {.reads = first.reads.united(second.reads.without(first.writes)),
          .writes = first.writes.united(second.writes)};
}

SegmentAccess access_of(const ModelGraph& graph, const Layout& layout, const Step& step,
                        const std::vector<int32_t>& last_rows) {
  const Access access(graph, layout, step, last_rows);
  SegmentAccess all;
  for (int32_t i = step.first; i <= step.last; ++i)
    all = joined(all, access.of(graph.op(i)));
  return all;
}

}  // namespace flowprefill
