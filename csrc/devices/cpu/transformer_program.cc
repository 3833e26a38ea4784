// Steps and operators of a transformer program.
// Long because they share one workspace, and the operators are best read in the order of execution.
#include "devices/cpu/transformer_program.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>

#include "devices/cpu/team.h"

namespace flowprefill {
namespace {

constexpr int32_t kRowChunk = 32;   // rows a member takes at once where rows are shared out
constexpr int32_t kRowOpChunk = 4;  // the same for norms and rope alone
constexpr double kLog2E = 1.4426950408889634;

std::atomic<size_t> live_workspace{0};

[[noreturn]] void invalid(const std::string& message) {
  throw std::invalid_argument(message);
}

bool is_row_op(Op op) {
  return op == Op::kEmbed || op == Op::kAttnNorm || op == Op::kRope || op == Op::kMlpNorm ||
         op == Op::kFinalNorm;
}

const float* pointer_or_null(const std::vector<float>& values, int64_t offset = 0) {
  return values.empty() ? nullptr : values.data() + offset;
}

}  // namespace

size_t live_workspace_bytes() {
  return live_workspace.load(std::memory_order_relaxed);
}

template <typename T>
TransformerProgram<T>::TransformerProgram(std::shared_ptr<const Weights<T>> weights,
                                          std::shared_ptr<KvCache> cache,
                                          std::shared_ptr<BufferPool> pool, Batch batch,
                                          const PlanOptions& options, int64_t fail_at)
    : weights_(std::move(weights)),
      cache_(std::move(cache)),
      pool_(std::move(pool)),
      c_(weights_->config()),
      batch_(std::move(batch)),
      plan_((check_batch(), make_plan(c_, batch_, options))),
      threads_(options.threads),
      fail_at_(fail_at) {
  allocate();
  live_workspace.fetch_add(workspace_bytes(), std::memory_order_relaxed);
}

template <typename T>
TransformerProgram<T>::~TransformerProgram() {
  live_workspace.fetch_sub(workspace_bytes(), std::memory_order_relaxed);
  for (Buffer* buffer :
       {&hidden_, &rotary_, &normed_, &qkv_, &q_, &context_, &gated_, &last_, &logits_}) {
    pool_->give(std::move(*buffer));
  }
}

template <typename T>
void TransformerProgram<T>::check_batch() const {
  int32_t row = 0;
  const KvShape& shape = cache_->shape();
  for (size_t i = 0; i < batch_.sequences.size(); ++i) {
    const Sequence& s = batch_.sequences[i];
    const std::string name = "sequence " + std::to_string(i) + ": ";
    if (s.rows < 1)
      invalid(name + "got no tokens, expected at least 1");
    if (s.row_begin != row)
      invalid(name + "rows are not packed one after another");
    if (s.context < 0)
      invalid(name + "context: got " + std::to_string(s.context) + ", expected at least 0");
    row += s.rows;
    const int64_t needed =
        (int64_t{s.context} + s.rows + shape.block_tokens - 1) / shape.block_tokens;
    if (static_cast<int64_t>(s.block_table.size()) < needed) {
      invalid(name + "got " + std::to_string(s.block_table.size()) +
              " KV blocks, expected at least " + std::to_string(needed));
    }
    for (const int32_t block : s.block_table) {
      if (block < 0 || block >= shape.blocks) {
        invalid(name + "got KV block " + std::to_string(block) + ", expected 0.." +
                std::to_string(shape.blocks - 1));
      }
    }
  }
  if (row != batch_.rows() || row == 0)
    invalid("batch: the sequences' rows are not the tokens");
  for (const int32_t token : batch_.tokens) {
    if (token < 0 || token >= c_.vocab_size) {
      invalid("token id: got " + std::to_string(token) + ", expected 0.." +
              std::to_string(c_.vocab_size - 1));
    }
  }
}

template <typename T>
void TransformerProgram<T>::allocate() {
  const auto rows = static_cast<size_t>(batch_.rows());
  const auto tile = static_cast<size_t>(plan_.buffer_rows);
  const auto sequences = batch_.sequences.size();
  auto bytes = [this](size_t count, int32_t width, size_t size) {
    return pool_->take(count * static_cast<size_t>(width) * size);
  };
  hidden_ = bytes(rows, c_.hidden_size, sizeof(float));
  rotary_ = bytes(rows, c_.head_dim, sizeof(float));
  normed_ = bytes(tile, c_.hidden_size, sizeof(T));
  qkv_ = bytes(tile, c_.qkv_columns(), sizeof(float));
  q_ = bytes(tile, c_.q_columns(), sizeof(T));
  context_ = bytes(tile, c_.q_columns(), sizeof(T));
  gated_ = bytes(tile, c_.intermediate_size, sizeof(T));
  last_ = bytes(sequences, c_.hidden_size, sizeof(T));
  logits_ = bytes(sequences, c_.vocab_size, sizeof(float));
  sequence_of_row_.reserve(rows);
  for (size_t i = 0; i < sequences; ++i) {
    sequence_of_row_.insert(sequence_of_row_.end(), static_cast<size_t>(batch_.sequences[i].rows),
                            static_cast<int32_t>(i));
  }
}

template <typename T>
size_t TransformerProgram<T>::workspace_bytes() const {
  return hidden_.bytes() + rotary_.bytes() + normed_.bytes() + qkv_.bytes() + q_.bytes() +
         context_.bytes() + gated_.bytes() + last_.bytes() + logits_.bytes();
}

template <typename T>
size_t TransformerProgram<T>::live_bytes(size_t cursor) const {
  return cursor == 0 ? 0 : workspace_bytes();
}

template <typename T>
size_t TransformerProgram<T>::segment_end(size_t i) const {
  return i + 1 < plan_.segments.size() ? plan_.segments[i + 1] : plan_.steps.size();
}

template <typename T>
SegmentLabel TransformerProgram<T>::label(size_t i) const {
  const Step& first = plan_.steps[plan_.segments[i]];
  const Step& last = plan_.steps[segment_end(i) - 1];
  SegmentLabel label;
  label.op = op_name(first.first);
  label.layer = first.first == Op::kEmbed || first.first >= Op::kFinalNorm ? -1 : first.layer;
  label.last_layer = last.first >= Op::kFinalNorm ? -1 : last.layer;
  label.row_begin = first.row_begin;
  for (size_t s = plan_.segments[i]; s < segment_end(i); ++s) {
    const Step& step = plan_.steps[s];
    label.predicted_s += step.predicted_s;
    if (step.first >= Op::kFinalNorm && first.first < Op::kFinalNorm)
      continue;  // its rows are sequences or columns
    label.row_begin = std::min(label.row_begin, step.row_begin);
    label.row_end = std::max(label.row_end, step.row_end);
  }
  return label;
}

template <typename T>
void TransformerProgram<T>::execute(size_t i, const ExecutionContext& context) {
  if (context.team == nullptr)
    throw std::logic_error("a program of the CPU on a device without a team");
  team_ = context.team;
  for (size_t s = plan_.segments[i]; s < segment_end(i); ++s) {
    const Step& step = plan_.steps[s];
    if (static_cast<int64_t>(i) == fail_at_) {
      throw std::runtime_error(std::string("injected failure in ") + op_name(step.first));
    }
    execute_step(step);
  }
}

// ---- steps
// -----------------------------------------------------------------------------------------------

template <typename T>
void TransformerProgram<T>::execute_step(const Step& step) {
  if (step.first < Op::kAttention) {
    execute_chain(step, step.first, std::min(step.last, Op::kRope));
  }
  if (step.first <= Op::kAttention && step.last >= Op::kAttention)
    attention(step);
  if (step.last > Op::kAttention) {
    execute_chain(step, std::max(step.first, Op::kOutput), step.last);
  }
}

// Row-wise operators: with rows enough for all, each member takes its rows through the whole chain
// and no one waits in between; else all share every operator's columns, so that weights are read
// once.
template <typename T>
void TransformerProgram<T>::execute_chain(const Step& step, Op first, Op last) {
  const int32_t rows = step.row_end - step.row_begin;
  const bool has_own_rows = rows >= kRowsPerMember * threads_ && first < Op::kFinalNorm;
  if (!has_own_rows) {
    for (auto op = static_cast<uint8_t>(first); op <= static_cast<uint8_t>(last); ++op) {
      execute_shared(step, static_cast<Op>(op));
    }
    return;
  }
  team_->for_each((rows + kRowChunk - 1) / kRowChunk, [&](int64_t chunk) {
    const int32_t begin = step.row_begin + static_cast<int32_t>(chunk) * kRowChunk;
    const Rows mine{begin, std::min(begin + kRowChunk, step.row_end)};
    for (auto op = static_cast<uint8_t>(first); op <= static_cast<uint8_t>(last); ++op) {
      execute_op(step, static_cast<Op>(op), mine, 0,
                 column_blocks(static_cast<Op>(op), step.layer));
    }
  });
}

template <typename T>
void TransformerProgram<T>::execute_shared(const Step& step, Op op) {
  if (op == Op::kHead) {
    team_->for_each(step.row_end - step.row_begin, [&](int64_t block) {
      head(step.row_begin + block, step.row_begin + block + 1);
    });
    return;
  }
  const Rows rows{step.row_begin, step.row_end};
  if (is_row_op(op)) {
    const int32_t items = (rows.end - rows.begin + kRowOpChunk - 1) / kRowOpChunk;
    team_->for_each(items, [&](int64_t item) {
      const int32_t begin = rows.begin + static_cast<int32_t>(item) * kRowOpChunk;
      execute_op(step, op, {begin, std::min(begin + kRowOpChunk, rows.end)}, 0, 0);
    });
    return;
  }
  team_->for_each(column_blocks(op, step.layer),
                  [&](int64_t block) { execute_op(step, op, rows, block, block + 1); });
}

template <typename T>
int64_t TransformerProgram<T>::column_blocks(Op op, int32_t layer) const {
  if (is_row_op(op))
    return 0;
  const LayerWeights<T>& w = weights_->layer(layer);
  switch (op) {
    case Op::kQkv:
      return w.qkv.blocks();
    case Op::kOutput:
      return w.o.blocks();
    case Op::kGateUp:
      return w.gate_up.blocks();
    default:
      return w.down.blocks();
  }
}

template <typename T>
void TransformerProgram<T>::execute_op(const Step& step, Op op, Rows rows, int64_t begin,
                                       int64_t end) {
  switch (op) {
    case Op::kEmbed:
      return embed(rows);
    case Op::kAttnNorm:
      return norm(weights_->layer(step.layer).attn_norm, step, rows);
    case Op::kQkv:
      return weights_->layer(step.layer)
          .qkv.multiply(begin, end, rows.end - rows.begin,
                        tile(normed_, step, rows.begin, c_.hidden_size), c_.hidden_size,
                        qkv_.as<float>() + int64_t{rows.begin - step.base} * c_.qkv_columns(),
                        c_.qkv_columns(), false);
    case Op::kRope:
      return rope(step, rows);
    case Op::kOutput: {
      const LayerWeights<T>& w = weights_->layer(step.layer);
      return add_projection(w.o, w.o_bias, tile(context_, step, rows.begin, c_.q_columns()), rows,
                            begin, end);
    }
    case Op::kMlpNorm:
      return norm(weights_->layer(step.layer).mlp_norm, step, rows);
    case Op::kGateUp:
      return gate_up(step, rows, begin, end);
    case Op::kDown: {
      const LayerWeights<T>& w = weights_->layer(step.layer);
      return add_projection(w.down, w.down_bias,
                            tile(gated_, step, rows.begin, c_.intermediate_size), rows, begin, end);
    }
    case Op::kFinalNorm:
      return final_norm(rows);
    case Op::kAttention:
    case Op::kHead:
      break;  // shared out by themselves
  }
}

// ---- operators
// -------------------------------------------------------------------------------------------

template <typename T>
void TransformerProgram<T>::embed(Rows rows) {
  const int32_t half = c_.head_dim / 2;
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    const auto index = static_cast<size_t>(row);
    row_kernels<T>().widen(weights_->embedding(batch_.tokens[index]), c_.hidden_size, hidden(row));
    const Sequence& s = sequence_of(row);
    const double position = s.context + (row - s.row_begin);
    float* cos = rotary_.as<float>() + int64_t{row} * c_.head_dim;
    for (int32_t i = 0; i < half; ++i) {
      const double angle = position * c_.inverse_frequencies[static_cast<size_t>(i)];
      cos[i] = static_cast<float>(std::cos(angle) * c_.rope_attention_scale);
      cos[half + i] = static_cast<float>(std::sin(angle) * c_.rope_attention_scale);
    }
  }
}

template <typename T>
void TransformerProgram<T>::norm(const std::vector<float>& weight, const Step& step, Rows rows) {
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    row_kernels<T>().rms_norm(hidden(row), weight.data(), c_.hidden_size, c_.rms_eps,
                              tile(normed_, step, row, c_.hidden_size));
  }
}

template <typename T>
void TransformerProgram<T>::rope(const Step& step, Rows rows) {
  const int32_t block_tokens = cache_->shape().block_tokens;
  for (int32_t row = rows.begin; row < rows.end;) {
    const Sequence& s = sequence_of(row);
    const int32_t slot = (s.context + row - s.row_begin) % block_tokens;
    const int32_t end = std::min({rows.end, s.row_begin + s.rows, row + block_tokens - slot});
    rotate_queries(step, {row, end});
    store_keys_and_values(step, {row, end}, s);
    row = end;
  }
}

template <typename T>
void TransformerProgram<T>::rotate_queries(const Step& step, Rows rows) {
  const LayerWeights<T>& w = weights_->layer(step.layer);
  const int32_t dim = c_.head_dim;
  const auto softmax_scale = static_cast<float>(kLog2E / std::sqrt(static_cast<double>(dim)));
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    const float* cos = rotary_.as<float>() + int64_t{row} * dim;
    const float* in = qkv_row(step, row);
    T* q = tile(q_, step, row, c_.q_columns());
    for (int32_t h = 0; h < c_.num_heads; ++h) {
      row_kernels<T>().rope(in + h * dim,
                            {.bias = pointer_or_null(w.qkv_bias, int64_t{h} * dim),
                             .norm_weight = pointer_or_null(w.q_norm),
                             .norm_eps = c_.rms_eps,
                             .scale = softmax_scale,
                             .dim = dim},
                            cos, cos + dim / 2, q + h * dim);
    }
  }
}

// Keys and values of rows that lie in one block of the cache.
template <typename T>
void TransformerProgram<T>::store_keys_and_values(const Step& step, Rows rows, const Sequence& s) {
  const LayerWeights<T>& w = weights_->layer(step.layer);
  const RowKernels<T>& kernels = row_kernels<T>();
  const int32_t dim = c_.head_dim;
  const int32_t block_tokens = cache_->shape().block_tokens;
  const int32_t position = s.context + rows.begin - s.row_begin;
  const int32_t block = s.block_table[static_cast<size_t>(position / block_tokens)];
  const int32_t slot = position % block_tokens;
  const int32_t count = rows.end - rows.begin;
  // The step that begins a block and ends in it clears the rest: attention reads whole blocks.
  const int32_t first_row = std::max(step.row_begin, s.row_begin);
  const bool is_last = rows.end == std::min(step.row_end, s.row_begin + s.rows);
  const bool clears_rest = is_last && rows.begin - slot >= first_row && slot + count < block_tokens;
  thread_local std::vector<T> keys;
  keys.resize(static_cast<size_t>(count) * static_cast<size_t>(dim));
  for (int32_t h = 0; h < c_.num_kv_heads; ++h) {
    const int64_t k = c_.q_columns() + int64_t{h} * dim;
    const int64_t v = k + c_.kv_columns();
    const RopeHead head{.bias = pointer_or_null(w.qkv_bias, k),
                        .norm_weight = pointer_or_null(w.k_norm),
                        .norm_eps = c_.rms_eps,
                        .scale = 1.0f,
                        .dim = dim};
    for (int32_t r = 0; r < count; ++r) {
      const float* cos = rotary_.as<float>() + int64_t{rows.begin + r} * dim;
      kernels.rope(qkv_row(step, rows.begin + r) + k, head, cos, cos + dim / 2,
                   keys.data() + r * dim);
    }
    kernels.store_keys(keys.data(), count, dim, cache_->template key<T>(step.layer, block, h), slot,
                       block_tokens);
    kernels.store_values(qkv_row(step, rows.begin) + v, c_.qkv_columns(),
                         pointer_or_null(w.qkv_bias, v), count, dim,
                         cache_->template value<T>(step.layer, block, h), slot);
    if (clears_rest)
      cache_->template clear_values_from<T>(step.layer, block, h, slot + count);
  }
}

// hidden[rows] += input * W (+ bias): the product accumulates into the residual stream.
template <typename T>
void TransformerProgram<T>::add_projection(const PackedLinear<T>& linear,
                                           const std::vector<float>& bias, const T* input,
                                           Rows rows, int64_t begin, int64_t end) {
  if (!bias.empty()) {
    const int64_t first = begin * kPackColumns;
    const int64_t last = std::min<int64_t>(end * kPackColumns, linear.columns());
    for (int32_t row = rows.begin; row < rows.end; ++row) {
      for (int64_t i = first; i < last; ++i)
        hidden(row)[i] += bias[static_cast<size_t>(i)];
    }
  }
  linear.multiply(begin, end, rows.end - rows.begin, input, linear.depth(), hidden(rows.begin),
                  c_.hidden_size, true);
}

template <typename T>
void TransformerProgram<T>::gate_up(const Step& step, Rows rows, int64_t begin, int64_t end) {
  const LayerWeights<T>& w = weights_->layer(step.layer);
  const int32_t count = rows.end - rows.begin;
  thread_local std::vector<float> product;
  product.resize(static_cast<size_t>(count) * kPackColumns);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t width = w.gate_up.block_columns(block);
    const float* bias = pointer_or_null(w.gate_up_bias, block * kPackColumns);
    for (int32_t r = 0; bias != nullptr && r < count; ++r) {
      std::copy_n(bias, width, product.data() + r * width);
    }
    w.gate_up.multiply_block(block, count, tile(normed_, step, rows.begin, c_.hidden_size),
                             c_.hidden_size, product.data(), width, bias != nullptr);
    row_kernels<T>().swiglu(
        product.data(), width, count, static_cast<int>(width / 2),
        tile(gated_, step, rows.begin, c_.intermediate_size) + block * kGateColumns,
        c_.intermediate_size);
  }
  brgemm_end<T>();
}

template <typename T>
void TransformerProgram<T>::attention(const Step& step) {
  std::vector<AttentionItem> items;
  const int32_t group = c_.num_heads / c_.num_kv_heads;
  const int32_t head_end = step.head_end == 0 ? c_.num_kv_heads : step.head_end;
  const int32_t item_rows = attention_item_rows(step.row_end - step.row_begin, group,
                                                head_end - step.head_begin, threads_);
  for (int32_t row = step.row_begin; row < step.row_end;) {
    const Sequence& s = sequence_of(row);
    const int32_t end = std::min({step.row_end, s.row_begin + s.rows, row + item_rows});
    for (int32_t h = step.head_begin; h < head_end; ++h) {
      items.push_back({.row = row - step.base,
                       .rows = end - row,
                       .position = s.context + (row - s.row_begin),
                       .kv_head = h,
                       .block_table = s.block_table.data()});
    }
    row = end;
  }
  const AttentionArgs<T> args{.cache = cache_.get(),
                              .layer = step.layer,
                              .num_heads = c_.num_heads,
                              .window = c_.windows[static_cast<size_t>(step.layer)],
                              .q = q_.as<T>(),
                              .out = context_.as<T>()};
  team_->for_each(static_cast<int64_t>(items.size()),
                  [&](int64_t i) { attend(args, items[static_cast<size_t>(i)]); });
}

template <typename T>
void TransformerProgram<T>::final_norm(Rows sequences) {
  for (int32_t i = sequences.begin; i < sequences.end; ++i) {
    const Sequence& s = batch_.sequences[static_cast<size_t>(i)];
    row_kernels<T>().rms_norm(hidden(s.row_begin + s.rows - 1), weights_->final_norm().data(),
                              c_.hidden_size, c_.rms_eps,
                              last_.as<T>() + int64_t{i} * c_.hidden_size);
  }
}

template <typename T>
void TransformerProgram<T>::head(int64_t begin, int64_t end) {
  weights_->head().multiply(begin, end, num_sequences(), last_.as<T>(), c_.hidden_size,
                            logits_.as<float>(), c_.vocab_size, false);
}

template class TransformerProgram<float>;
template class TransformerProgram<Bf16>;

}  // namespace flowprefill
