#include "graph/planner.h"

#include <algorithm>
#include <array>

namespace flowprefill {
namespace {

class Planner {
 public:
  Planner(const ModelConfig& config, const Batch& batch, const PlanOptions& options)
      : c_(config), batch_(batch), o_(options) {
    sum_positions();
  }

  Plan make() {
    const int32_t rows = batch_.rows();
    const bool is_chunked = o_.granularity == Granularity::kChunk;
    const int32_t chunk = is_chunked ? o_.chunk_tokens : rows;
    tile_ = o_.granularity == Granularity::kOperator ? rows : tile_rows();
    for (int32_t begin = 0; begin < rows; begin += chunk) {
      begin_segment();
      add_prompt_rows(begin, std::min(begin + chunk, rows));
    }
    if (!is_chunked)
      begin_segment_if(o_.granularity != Granularity::kNone);
    add_head();
    if (o_.granularity == Granularity::kBudget)
      merge();
    plan_.buffer_rows = std::min(tile_, rows);
    return std::move(plan_);
  }

  double predict(const Step& step) const {
    const double whole_s = range_s(step.first, step.last, step.layer, step.row_begin, step.row_end);
    const double share =
        step.head_end == 0 ? 1.0
                           : static_cast<double>(step.head_end - step.head_begin) / c_.num_kv_heads;
    return o_.rates.step_overhead_s + share * whole_s;
  }

 private:
  // ---- cost of operators
  // -------------------------------------------------------------------------------

  void sum_positions() {
    keys_before_.reserve(batch_.tokens.size() + 1);
    keys_before_.push_back(0);
    for (const Sequence& s : batch_.sequences) {
      for (int32_t i = 0; i < s.rows; ++i) {
        keys_before_.push_back(keys_before_.back() + s.context + i + 1);
      }
    }
  }

  double linear_s(int64_t depth, int64_t columns, int32_t rows) const {
    const double weights = static_cast<double>(depth) * static_cast<double>(columns);
    return std::max(2.0 * weights * rows / o_.rates.gemm_flops_per_s,
                    weights * o_.element_bytes / o_.rates.weight_bytes_per_s);
  }

  double attention_s(int32_t layer, int32_t begin, int32_t end) const {
    end = std::min(end, batch_.rows());  // rows beyond it are padding
    begin = std::min(begin, end);
    double pairs = static_cast<double>(keys_before_[static_cast<size_t>(end)] -
                                       keys_before_[static_cast<size_t>(begin)]);
    const int32_t window = c_.windows[static_cast<size_t>(layer)];
    if (window > 0)
      pairs = std::min(pairs, static_cast<double>(window) * (end - begin));
    return pairs * 4.0 * c_.q_columns() / o_.rates.attention_flops_per_s;
  }

  double op_s(Op op, int32_t layer, int32_t begin, int32_t end) const {
    const int32_t rows = end - begin;
    switch (op) {
      case Op::kEmbed:
        return rows * o_.cuts.embed_row_s / o_.threads;
      case Op::kQkv:
        return linear_s(c_.hidden_size, c_.qkv_columns(), rows);
      case Op::kAttention:
        return attention_s(layer, begin, end);
      case Op::kOutput:
        return linear_s(c_.q_columns(), c_.hidden_size, rows);
      case Op::kGateUp:
        return linear_s(c_.hidden_size, 2 * int64_t{c_.intermediate_size}, rows);
      case Op::kDown:
        return linear_s(c_.intermediate_size, c_.hidden_size, rows);
      case Op::kHead:
        return linear_s(c_.hidden_size, int64_t{rows} * 64, sequences());
      case Op::kAttnNorm:
      case Op::kRope:
      case Op::kMlpNorm:
      case Op::kFinalNorm:
        break;
    }
    return 0.0;  // row-wise work rides in the measured rate of the products beside it
  }

  double range_s(Op first, Op last, int32_t layer, int32_t begin, int32_t end) const {
    double total = 0;
    for (auto op = static_cast<uint8_t>(first); op <= static_cast<uint8_t>(last); ++op) {
      total += op_s(static_cast<Op>(op), layer, begin, end);
    }
    return total;
  }

  int32_t sequences() const { return static_cast<int32_t>(batch_.sequences.size()); }

  // ---- steps
  // -------------------------------------------------------------------------------------------

  void begin_segment() { plan_.segments.push_back(static_cast<uint32_t>(plan_.steps.size())); }
  void begin_segment_if(bool wanted) {
    if (wanted)
      begin_segment();
  }

  void add(Op first, Op last, int32_t layer, int32_t begin, int32_t end) {
    plan_.steps.push_back({.first = first,
                           .last = last,
                           .layer = layer,
                           .row_begin = begin,
                           .row_end = end,
                           .base = base_});
    plan_.steps.back().predicted_s = predict(plan_.steps.back());
  }

  // Rows of a tile: enough that each team member has rows of its own; with a budget, no single
  // operator of a tile may exceed it as long as slices stay efficient (CPU: 16 rows a member were
  // measured at 97 % of the peak rate).
  int32_t tile_rows() const {
    const CutRules& cuts = o_.cuts;
    int32_t tile = cuts.max_tile_rows > 0 ? cuts.max_tile_rows : kRowsPerMember * o_.threads;
    if (o_.granularity != Granularity::kBudget)
      return tile;
    const int32_t floor = cuts.min_tile_rows > 0 ? cuts.min_tile_rows : cuts.row_step * o_.threads;
    while (tile > floor && range_s(Op::kGateUp, Op::kGateUp, 0, 0, tile) > o_.budget_s) {
      tile = std::max(floor, tile / 2);
    }
    return tile;
  }

  void add_prompt_rows(int32_t begin, int32_t end) {
    const bool is_operator = o_.granularity == Granularity::kOperator;
    const bool is_budget = o_.granularity == Granularity::kBudget;
    for (int32_t row = begin; row < end; row += o_.cuts.embed_rows) {
      begin_segment_if(is_budget && row > begin);
      add(Op::kEmbed, Op::kEmbed, 0, row, std::min(row + o_.cuts.embed_rows, end));
    }
    for (int32_t layer = 0; layer < c_.num_layers; ++layer) {
      begin_segment_if(o_.granularity == Granularity::kLayer);
      for (int32_t row = begin; row < end; row += tile_) {
        base_ = row;
        const int32_t stop = std::min(row + tile_, end);
        if (is_operator)
          add_operators(layer, row, stop);
        else if (is_budget)
          add_within_budget(layer, row, stop);
        else
          add(Op::kAttnNorm, Op::kDown, layer, row, stop);
      }
    }
  }

  // The operators the paper names; norms and rope ride with the projection beside them.
  void add_operators(int32_t layer, int32_t begin, int32_t end) {
    constexpr std::array<std::array<Op, 2>, 5> kOperators = {{{Op::kAttnNorm, Op::kRope},
                                                              {Op::kAttention, Op::kAttention},
                                                              {Op::kOutput, Op::kOutput},
                                                              {Op::kMlpNorm, Op::kGateUp},
                                                              {Op::kDown, Op::kDown}}};
    for (const auto& [first, last] : kOperators) {
      begin_segment();
      add(first, last, layer, begin, end);
    }
  }

  void add_within_budget(int32_t layer, int32_t begin, int32_t end) {
    add_chain(Op::kAttnNorm, Op::kRope, layer, begin, end);
    for (int32_t row = begin; row < end;) {
      const int32_t stop = std::min(row + attention_rows(layer, row, end), end);
      add_attention(layer, row, stop);
      row = stop;
    }
    add_chain(Op::kOutput, Op::kDown, layer, begin, end);
  }

  // All heads of some rows, in as many slices of heads as the budget wants.
  void add_attention(int32_t layer, int32_t begin, int32_t end) {
    const int32_t heads = c_.num_kv_heads;
    const double one_s = attention_s(layer, begin, end) / heads;
    const bool is_whole = !o_.cuts.slices_heads || one_s * heads <= o_.budget_s;
    const int32_t fitting =
        is_whole ? heads : std::clamp(static_cast<int32_t>(o_.budget_s / one_s), 1, heads);
    const int32_t slices = (heads + fitting - 1) / fitting;
    for (int32_t i = 0; i < slices; ++i) {
      begin_segment();
      add(Op::kAttention, Op::kAttention, layer, begin, end);
      if (slices == 1)
        continue;
      Step& step = plan_.steps.back();
      step.head_begin = heads * i / slices;
      step.head_end = heads * (i + 1) / slices;
      step.predicted_s = predict(step);
    }
  }

  // Row-wise operators in one step if they fit the budget together, else one by one.
  void add_chain(Op first, Op last, int32_t layer, int32_t begin, int32_t end) {
    if (range_s(first, last, layer, begin, end) <= o_.budget_s) {
      begin_segment();
      add(first, last, layer, begin, end);
      return;
    }
    for (auto op = static_cast<uint8_t>(first); op <= static_cast<uint8_t>(last); ++op) {
      begin_segment();
      add(static_cast<Op>(op), static_cast<Op>(op), layer, begin, end);
    }
  }

  // Most rows from `row` whose attention fits the budget, head by head if it may be, in equal
  // slices of whole row blocks.
  int32_t attention_rows(int32_t layer, int32_t row, int32_t end) const {
    const double budget_s = o_.budget_s * (o_.cuts.slices_heads ? c_.num_kv_heads : 1);
    const double total = attention_s(layer, row, end);
    if (total <= budget_s)
      return end - row;
    const double wanted = std::min(total / budget_s, static_cast<double>(end - row));
    const auto slices = static_cast<int32_t>(wanted) + 1;
    const int32_t rows = (end - row + slices - 1) / slices;
    const int32_t step = o_.cuts.row_step;
    return std::max(step, rows / step * step);
  }

  void add_head() {
    base_ = 0;
    const int32_t blocks = (c_.vocab_size + 63) / 64;
    add(Op::kFinalNorm, Op::kFinalNorm, c_.num_layers, 0, sequences());
    int32_t slice = blocks;
    if (o_.granularity == Granularity::kBudget) {
      const double one = op_s(Op::kHead, 0, 0, blocks) / blocks;
      const double fitting = std::min(o_.budget_s / one, static_cast<double>(blocks));
      const int32_t floor = o_.cuts.min_head_blocks > 0 ? o_.cuts.min_head_blocks : 8 * o_.threads;
      slice = std::max(static_cast<int32_t>(fitting), floor);
    }
    for (int32_t block = 0; block < blocks; block += slice) {
      begin_segment_if(block > 0);
      add(Op::kHead, Op::kHead, c_.num_layers, block, std::min(block + slice, blocks));
    }
  }

  // Joins neighbouring segments while they fit the budget together.
  void merge() {
    std::vector<uint32_t> merged;
    double filled = 0;
    for (size_t i = 0; i < plan_.segments.size(); ++i) {
      const size_t end = i + 1 < plan_.segments.size() ? plan_.segments[i + 1] : plan_.steps.size();
      double cost = 0;
      for (size_t s = plan_.segments[i]; s < end; ++s)
        cost += plan_.steps[s].predicted_s;
      if (merged.empty() || filled + cost > o_.budget_s) {
        merged.push_back(plan_.segments[i]);
        filled = 0;
      }
      filled += cost;
    }
    plan_.segments = std::move(merged);
  }

  const ModelConfig& c_;
  const Batch& batch_;
  const PlanOptions& o_;
  Plan plan_;
  std::vector<int64_t> keys_before_;  // [rows + 1] keys seen by all rows before this one
  int32_t tile_ = 0;
  int32_t base_ = 0;
};

}  // namespace

const char* op_name(Op op) {
  constexpr std::array<const char*, 11> kNames = {
      "embed",    "attn_norm",    "qkv_proj",  "rope",       "attention", "o_proj",
      "mlp_norm", "gate_up_proj", "down_proj", "final_norm", "lm_head"};
  return kNames[static_cast<size_t>(op)];
}

Plan make_plan(const ModelConfig& config, const Batch& batch, const PlanOptions& options) {
  return Planner(config, batch, options).make();
}

std::vector<double> predict_steps(const ModelConfig& config, const Batch& batch,
                                  const PlanOptions& options, std::span<const Step> steps) {
  const Planner planner(config, batch, options);
  std::vector<double> seconds;
  seconds.reserve(steps.size());
  for (const Step& step : steps)
    seconds.push_back(planner.predict(step));
  return seconds;
}

}  // namespace flowprefill
