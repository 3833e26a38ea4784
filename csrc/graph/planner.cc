#include "graph/planner.h"

#include <algorithm>
#include <cmath>

#include "graph/key_chunks.h"
#include "graph/slices.h"

namespace flowprefill {
namespace {

class Planner {
 public:
  Planner(const ModelGraph& graph, const Batch& batch, const PlanOptions& options,
          const CutRules& cuts)
      : g_(graph),
        batch_(batch),
        o_(options),
        cuts_(cuts),
        cost_(graph, batch, options.rates, cuts.costs) {
    if (cuts.chunks_keys)
      chunks_ = KeyChunks::of(graph.attention.heads, cuts.multiprocessors);
  }

  Plan make() {
    const int32_t rows = batch_.rows();
    const bool is_chunked = o_.granularity == Granularity::kChunk;
    const int32_t chunk = is_chunked ? o_.chunk_tokens : rows;
    tile_ = o_.granularity == Granularity::kOperator ? rows : tile_rows();
    for (int32_t begin = 0; begin < rows; begin += chunk) {
      begin_segment();
      add_prompt_rows(begin, std::min(begin + chunk, rows));
      add_rows_after_layers(begin, std::min(begin + chunk, rows));
    }
    const bool has_sequence_rows = g_.after_layers().begin < g_.after_layers().end;
    begin_segment_if(has_sequence_rows && !is_chunked && o_.granularity != Granularity::kNone);
    add_sequence_rows();
    if (is_budget())
      merge();
    plan_.tile_rows = std::min(tile_, rows);
    plan_.chunk_rows = std::min(chunk, rows);
    const bool has_head_tiles = g_.rows_after_layers().begin < g_.rows_after_layers().end;
    plan_.head_tile_rows = has_head_tiles ? std::min(cuts_.head_tile_rows, rows) : 0;
    return std::move(plan_);
  }

 private:
  bool is_budget() const { return o_.granularity == Granularity::kBudget; }

  void begin_segment() { plan_.segments.push_back(static_cast<uint32_t>(plan_.steps.size())); }
  void begin_segment_if(bool wanted) {
    if (wanted)
      begin_segment();
  }

  void add(const Step& step) {
    plan_.steps.push_back(step);
    plan_.steps.back().work = cost_.step_work(step);
    plan_.steps.back().predicted_s = o_.rates.seconds(plan_.steps.back().work);
  }
  void add(int32_t first, int32_t last, int32_t begin, int32_t end) {
    add({.first = first, .last = last, .row_begin = begin, .row_end = end, .base = base_});
  }

  void add_segment(int32_t first, int32_t last, int32_t begin, int32_t end) {
    begin_segment();
    add(first, last, begin, end);
  }

  // ---- rows of the prompt

  // With a budget no product of a tile, or the smallest slice of one, may exceed it, as long as
  // tiles stay efficient.
  int32_t tile_rows() const {
    const Operator* experts = g_.first_experts();
    const int32_t layer = experts == nullptr ? 0 : experts->layer;
    int32_t tile = cuts_.max_tile_rows;
    if (experts != nullptr)
      tile = std::max(tile, cuts_.expert_rows * experts->experts / experts->slots);
    while (is_budget() && tile > cuts_.min_tile_rows && dearest_s(layer, tile) > o_.budget_s)
      tile = std::max(cuts_.min_tile_rows, tile / 2);
    return tile;
  }

  double dearest_s(int32_t layer, int32_t rows) const {
    double dearest = 0;
    const auto [begin, end] = g_.layer(layer);
    for (int32_t i = begin; i < end; ++i) {
      const Operator& op = g_.op(i);
      if (is_row_wise(op))
        dearest = std::max(dearest, cost_.operator_s(op, 0, rows) * smallest_slice(op));
    }
    return dearest;
  }

  // As a share of the operator.
  double smallest_slice(const Operator& op) const {
    if (!cuts_.slices_products || !is_product(op))
      return 1.0;
    return std::min(1.0, static_cast<double>(cuts_.min_product_parts) / g_.parts(op));
  }

  void add_prompt_rows(int32_t begin, int32_t end) {
    const int32_t last = g_.before_layers().end - 1;
    for (int32_t row = begin; row < end; row += cuts_.embed_rows) {
      begin_segment_if(is_budget() && row > begin);
      add(0, last, row, std::min(row + cuts_.embed_rows, end));
    }
    for (int32_t layer = 0; layer < g_.num_layers; ++layer) {
      begin_segment_if(o_.granularity == Granularity::kLayer);
      for (int32_t row = begin; row < end; row += tile_) {
        base_ = row;
        add_tile(g_.layer(layer), row, std::min(row + tile_, end));
      }
    }
  }

  void add_tile(ModelGraph::Range layer, int32_t begin, int32_t end) {
    if (o_.granularity == Granularity::kOperator)
      add_operators(layer, begin, end);
    else if (is_budget())
      add_within_budget(layer, begin, end);
    else
      add(layer.begin, layer.end - 1, begin, end);
  }

  // The operators the paper names, one segment each: light ones ride with a product or attention.
  void add_operators(ModelGraph::Range layer, int32_t begin, int32_t end) {
    int32_t first = layer.begin;
    for (int32_t i = layer.begin + 1; i <= layer.end; ++i) {
      if (i < layer.end && !starts_group(first, i))
        continue;
      begin_segment();
      add(first, i - 1, begin, end);
      first = i;
    }
  }

  // Whether operator i cannot ride with [first, i): they have a heavy one, and i is heavy itself or
  // reads nothing that the tile holds.
  bool starts_group(int32_t first, int32_t i) const {
    const auto is_heavy = [this](int32_t index) { return !is_light(g_.op(index)); };
    bool has_heavy = false;
    for (int32_t j = first; j < i; ++j)
      has_heavy = has_heavy || is_heavy(j);
    return has_heavy && (is_heavy(i) || g_.tensor(g_.op(i).input).extent != Extent::kTile);
  }

  void add_within_budget(ModelGraph::Range layer, int32_t begin, int32_t end) {
    int32_t first = layer.begin;
    for (int32_t i = layer.begin; i <= layer.end; ++i) {
      if (i < layer.end && is_row_wise(g_.op(i)))
        continue;
      if (first < i)
        add_chain(first, i - 1, begin, end);
      if (i < layer.end)
        add_attention(i, begin, end);
      first = i + 1;
    }
  }

  // Row-wise operators in steps of as many as fit the budget together; where products are sliced,
  // all in one step or one by one.
  void add_chain(int32_t first, int32_t last, int32_t begin, int32_t end) {
    const bool fit_together = cost_.range_s(first, last, begin, end) <= o_.budget_s;
    for (int32_t i = first; i <= last; ++i) {
      const bool fits = cost_.range_s(first, std::min(i + 1, last), begin, end) <= o_.budget_s;
      if (i < last && (cuts_.slices_products ? fit_together : fits))
        continue;
      const Operator& op = g_.op(i);
      const bool is_sliced = cuts_.slices_products && is_product(op);
      if (first == i)
        add_parts(i, begin, end, is_sliced ? cuts_.min_product_parts : g_.parts(op));
      else
        add_segment(first, i, begin, end);
      first = i + 1;
    }
  }

  void add_attention(int32_t index, int32_t begin, int32_t end) {
    for (int32_t row = begin; row < end;) {
      const SliceRules rules = slice_rules(g_.op(index), row, end);
      const int32_t stop = std::min(row + attention_rows(g_.op(index), row, end, rules), end);
      add_parts(index, row, stop, least_kv_heads(row, stop, rules));
      row = stop;
    }
  }

  // What holds for a slice of attention from some row on.
  struct SliceRules {
    int32_t end;  // of its rows, if it does not have all that there are
    int32_t row_step;
    int32_t least_queries;
  };

  // The rows of a slice whose keys are split have the same chunks. Windows are not split.
  SliceRules slice_rules(const Operator& op, int32_t row, int32_t end) const {
    const SliceRules whole{end, cuts_.row_step, cuts_.min_attention_queries};
    if (chunks_.count == 0 || op.window > 0)
      return whole;
    const auto s = std::ranges::upper_bound(batch_.sequences, row, {}, &Sequence::row_end);
    const int32_t position = s == batch_.sequences.end() ? 0 : s->context + row - s->row_begin;
    if (chunks_.keys_at(position) == 0)
      return whole;
    const int32_t chunks = chunks_.count_at(position);
    return {.end = std::min({end, s->row_end(), row + (chunks_.end_at(position) - position)}),
            .row_step = cuts_.chunk_row_step,
            .least_queries = (cuts_.min_attention_queries + chunks - 1) / chunks};
  }

  // KV heads of a slice over these rows.
  int32_t least_kv_heads(int32_t begin, int32_t end, const SliceRules& rules) const {
    const int32_t all = g_.attention.kv_heads;
    const int64_t queries = queries_of_kv_head(begin, end);
    const int64_t wanted = (rules.least_queries + queries - 1) / queries;
    const bool has_all = cuts_.attention_slices == AttentionSlices::kRows;
    return has_all ? all : static_cast<int32_t>(std::min<int64_t>(wanted, all));
  }

  int64_t queries_of_kv_head(int32_t begin, int32_t end) const {
    const int32_t tile = cuts_.attention_tile;
    int64_t queries = 0;
    for (const Sequence& s : batch_.sequences) {
      const int64_t rows = std::min(end, s.row_end()) - std::max(begin, s.row_begin);
      if (rows > 0)
        queries += (rows * g_.attention.heads_per_kv() + tile - 1) / tile * tile;
    }
    return std::max<int64_t>(queries, 1);  // rows of padding alone have none
  }

  // Most rows from `row` whose attention fits the budget, head by head if that comes first, in
  // equal slices of whole row blocks; not so few that all heads of them leave the device idle.
  int32_t attention_rows(const Operator& op, int32_t row, int32_t end,
                         const SliceRules& rules) const {
    const bool heads_first = cuts_.attention_slices == AttentionSlices::kHeadsFirst;
    const double budget_s = o_.budget_s * (heads_first ? g_.parts(op) : 1);
    if (cost_.operator_s(op, row, end) <= budget_s)
      return end - row;
    end = rules.end;
    const double total = cost_.operator_s(op, row, end);
    if (total <= budget_s)
      return end - row;
    const auto all = static_cast<double>(end - row);
    const double queries = static_cast<double>(queries_of_kv_head(row, end)) * g_.parts(op);
    const double least = std::min(rules.least_queries / queries, 1.0) * all;
    const auto slices = static_cast<int32_t>(std::min(total / budget_s, all)) + 1;
    const int32_t steps = (end - row + slices - 1) / slices / rules.row_step;
    const int32_t rows = whole_turns(cuts_, steps) * rules.row_step;
    const auto least_steps = static_cast<int32_t>(std::ceil(least / rules.row_step));
    return std::min(std::max({rows, least_steps * rules.row_step, rules.row_step}), end - row);
  }

  // One operator over some rows, in as many equal slices of its parts as the budget wants, each of
  // at least min_parts.
  void add_parts(int32_t index, int32_t begin, int32_t end, int32_t min_parts) {
    const int32_t parts = g_.parts(g_.op(index));
    const double one_s = cost_.operator_s(g_.op(index), begin, end) / parts;
    const double wanted = std::min(o_.budget_s / one_s, static_cast<double>(parts));
    const int32_t fitting = std::max({static_cast<int32_t>(wanted), std::min(min_parts, parts), 1});
    const int32_t slices = (parts + fitting - 1) / fitting;
    const std::vector<int32_t> ends =
        is_product(g_.op(index)) ? ends_of_product(cuts_, end - begin, parts, slices, fitting)
                                 : equal_ends(parts, slices);
    for (size_t i = 0; i < ends.size(); ++i) {
      begin_segment();
      add({.first = index,
           .last = index,
           .row_begin = begin,
           .row_end = end,
           .base = base_,
           .part_begin = i == 0 ? 0 : ends[i - 1],
           .part_end = ends.size() == 1 ? 0 : ends[i]});
    }
  }

  // ---- rows of the prompt, behind the layers

  // Tiles of their own: a row of logits is much larger than all that a layer keeps of a row.
  void add_rows_after_layers(int32_t begin, int32_t end) {
    const auto range = g_.rows_after_layers();
    if (range.begin == range.end)
      return;
    begin_segment_if(o_.granularity == Granularity::kLayer);
    for (int32_t row = begin; row < end; row += cuts_.head_tile_rows) {
      base_ = row;
      const int32_t stop = std::min(row + cuts_.head_tile_rows, end);
      begin_segment_if(o_.granularity == Granularity::kOperator);
      if (is_budget())
        add_head_tile(range, row, stop);
      else
        add(range.begin, range.end - 1, row, stop);
    }
  }

  // Products in slices of their parts, the rest in slices of rows.
  void add_head_tile(ModelGraph::Range range, int32_t begin, int32_t end) {
    for (int32_t i = range.begin; i < range.end; ++i) {
      const Operator& op = g_.op(i);
      if (op.kind == OperatorKind::kLinear) {
        add_parts(i, begin, end, cuts_.min_product_parts);
        continue;
      }
      const double row_s = cost_.operator_s(op, begin, end) / (end - begin);
      const double wanted = std::min(o_.budget_s / row_s, static_cast<double>(end - begin));
      const int32_t rows = std::max(static_cast<int32_t>(wanted), 1);
      for (int32_t row = begin; row < end; row += rows)
        add_segment(i, i, row, std::min(row + rows, end));
    }
  }

  // ---- rows of the sequences

  // Products over the vocabulary are sliced by parts; what is light rides with them.
  void add_sequence_rows() {
    base_ = 0;
    const auto [first, end] = g_.after_layers();
    for (int32_t i = first; i < end; ++i) {
      const Operator& op = g_.op(i);
      const int32_t parts = g_.parts(op);
      const int32_t slice = is_budget() ? parts_within_budget(op, parts) : parts;
      for (int32_t part = 0; part < parts; part += slice) {
        begin_segment_if(part > 0);
        add({.first = i,
             .last = i,
             .row_begin = 0,
             .row_end = batch_.num_sequences(),
             .part_begin = slice < parts ? part : 0,
             .part_end = slice < parts ? std::min(part + slice, parts) : 0});
      }
    }
  }

  int32_t parts_within_budget(const Operator& op, int32_t parts) const {
    if (parts == 1)
      return 1;
    const double one_s = cost_.operator_s(op, 0, batch_.num_sequences()) / parts;
    const double fitting = std::min(o_.budget_s / one_s, static_cast<double>(parts));
    return std::max(static_cast<int32_t>(fitting), cuts_.min_product_parts);
  }

  // ---- segments

  // Joins neighbouring segments while they fit the budget together.
  void merge() {
    std::vector<uint32_t> merged;
    double filled = 0;
    for (size_t i = 0; i < plan_.size(); ++i) {
      double cost = 0;
      for (const Step& step : plan_.segment(i))
        cost += step.predicted_s;
      if (merged.empty() || filled + cost > o_.budget_s) {
        merged.push_back(plan_.segments[i]);
        filled = 0;
      }
      filled += cost;
    }
    plan_.segments = std::move(merged);
  }

  const ModelGraph& g_;
  const Batch& batch_;
  const PlanOptions& o_;
  const CutRules& cuts_;
  const Cost cost_;
  KeyChunks chunks_;
  Plan plan_;
  int32_t tile_ = 0;
  int32_t base_ = 0;
};

}  // namespace

Plan make_plan(const ModelGraph& graph, const Batch& batch, const PlanOptions& options,
               const CutRules& cuts) {
  return Planner(graph, batch, options, cuts).make();
}

std::vector<double> predict_segments(const ModelGraph& graph, const Batch& batch,
                                     const PlanOptions& options, const CutRules& cuts,
                                     const Plan& plan) {
  const Cost cost(graph, batch, options.rates, cuts.costs);
  std::vector<double> seconds(plan.size(), 0.0);
  for (size_t i = 0; i < plan.size(); ++i) {
    for (const Step& step : plan.segment(i))
      seconds[i] += cost.step_s(step);
  }
  return seconds;
}

}  // namespace flowprefill
