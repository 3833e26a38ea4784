// CpuOperators: products, attention and row kernels, in the order in which a layer executes them.
#include "devices/cpu/cpu_operators.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "devices/cpu/experts.h"
#include "devices/cpu/gate.h"
#include "devices/cpu/sample.h"

namespace flowprefill {
namespace {

const float* offset_or_null(const float* values, int64_t offset) {
  return values == nullptr ? nullptr : values + offset;
}

// Head h of several; inverse_rms: of the row they are in, 0: each head has a norm of its own.
RopeHead head_of(const RopeHead& heads, int64_t h, float inverse_rms) {
  RopeHead head = heads;
  head.bias = offset_or_null(heads.bias, h * heads.dim);
  if (inverse_rms != 0.0f) {
    head.norm_weight = heads.norm_weight + h * heads.dim;
    head.inverse_rms = inverse_rms;
  }
  return head;
}

}  // namespace

template <typename T>
void CpuOperators<T>::execute(const Operator& op, const Step& step, RowRange rows, int64_t begin,
                              int64_t end, const std::byte* input) {
  switch (op.kind) {
    case OperatorKind::kEmbed:
      return embed(op, step, rows);
    case OperatorKind::kRotary:
      return rotary(op, step, rows);
    case OperatorKind::kNorm:
      return norm(op, step, rows);
    case OperatorKind::kLinear:
      return linear(op, step, rows, begin, end, input);
    case OperatorKind::kRope:
      return rope(op, step, rows);
    case OperatorKind::kResidual:
      return residual(op, step, rows);
    case OperatorKind::kRound:
      return round(op, step, rows);
    case OperatorKind::kScore:
      return score(op, step, rows);
    case OperatorKind::kPool:
      return pool(op, step, rows, begin, end);
    case OperatorKind::kSample:
      return choose(op, step, rows);
    case OperatorKind::kRoute:
      return route(a_, op, step, rows);
    case OperatorKind::kAttention:  // these two are shared out by items
    case OperatorKind::kExperts:
      return;
  }
}

template <typename T>
void CpuOperators<T>::embed(const Operator& op, const Step& step, RowRange rows) {
  const int32_t width = a_.graph.output_of(op).columns;
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    float* out = a_.template at<float>(op.output, step, row);
    a_.weights.look_up(op.weight, a_.batch.tokens[static_cast<size_t>(row)], out);
    for (int32_t i = 0; op.scale != 1.0 && i < width; ++i)
      out[i] *= static_cast<float>(op.scale);
  }
}

template <typename T>
void CpuOperators<T>::rotary(const Operator& op, const Step& step, RowRange rows) {
  const RotaryTable& table = a_.graph.rotary_tables[static_cast<size_t>(op.table)];
  const size_t half = table.inverse_frequencies.size();
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    const Sequence& s = a_.sequence_of(row);
    const double position = s.context + (row - s.row_begin);
    float* cos = a_.template at<float>(op.output, step, row);
    for (size_t i = 0; i < half; ++i) {
      const double angle = position * table.inverse_frequencies[i];
      cos[i] = static_cast<float>(std::cos(angle) * table.scale);
      cos[half + i] = static_cast<float>(std::sin(angle) * table.scale);
    }
  }
}

template <typename T>
void CpuOperators<T>::norm(const Operator& op, const Step& step, RowRange rows) {
  const bool is_gather = a_.graph.is_gather(op);
  const int32_t width = a_.graph.output_of(op).columns;
  const float* weight = a_.weights.vector(op.weight);
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    const int32_t from =
        is_gather ? a_.batch.sequences[static_cast<size_t>(row)].row_end() - 1 : row;
    const float* in = a_.template at<float>(op.input, step, from);
    if (a_.graph.output_of(op).type == ElementType::kFloat) {
      row_kernels<float>().rms_norm(in, weight, width, op.eps,
                                    a_.template at<float>(op.output, step, row));
    } else {
      row_kernels<T>().rms_norm(in, weight, width, op.eps, a_.template at<T>(op.output, step, row));
    }
  }
}

// ---- products

template <typename T>
void CpuOperators<T>::prepare_input(const Operator& op, const Step& step, RowRange rows,
                                    std::byte* prepared) {
  a_.weights.matrix(op.weight).prepare(rows.end - rows.begin,
                                       a_.template at<T>(op.input, step, rows.begin), prepared);
}

template <typename T>
void CpuOperators<T>::linear(const Operator& op, const Step& step, RowRange rows, int64_t begin,
                             int64_t end, const std::byte* prepared) {
  const void* input = prepared;
  const int64_t count = rows.end - rows.begin;
  const size_t row_bytes = a_.weights.matrix(op.weight).prepared_row_bytes(count);
  if (row_bytes == 0) {
    input = a_.template at<T>(op.input, step, rows.begin);
  } else if (input == nullptr) {
    thread_local std::vector<std::byte> own;
    own.resize(row_bytes * static_cast<size_t>(count));
    prepare_input(op, step, rows, own.data());
    input = own.data();
  }
  switch (op.epilogue) {
    case Epilogue::kStore:
      return store_product(op, step, rows, begin, end, input);
    case Epilogue::kAdd:
      return add_product(op, step, rows, begin, end, input);
    case Epilogue::kGate:
      return multiply_gate(a_, op, step, rows, begin, end, input);
  }
}

template <typename T>
void CpuOperators<T>::store_product(const Operator& op, const Step& step, RowRange rows,
                                    int64_t begin, int64_t end, const void* input) {
  const Linear<T>& linear = a_.weights.matrix(op.weight);
  const int64_t width = linear.columns();
  linear.multiply(begin, end, rows.end - rows.begin, input,
                  a_.template at<float>(op.output, step, rows.begin), width, false);
  const float* bias = a_.weights.vector(op.bias);
  const auto scale = static_cast<float>(op.scale);
  if (bias == nullptr && scale == 1.0f && op.softcap == 0.0f)
    return;
  const int64_t first = begin * kPackColumns;
  const int64_t last = std::min<int64_t>(end * kPackColumns, width);
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    float* out = a_.template at<float>(op.output, step, row);
    for (int64_t i = first; i < last; ++i)
      out[i] = out[i] * scale + (bias == nullptr ? 0.0f : bias[i]);
    if (op.softcap != 0.0f)
      row_kernels<T>().soft_cap(out + first, static_cast<int>(last - first), op.softcap);
  }
}

// The product accumulates into the residual stream, which stays in float: rounding it to bf16 at
// every layer costs more accuracy than everything else together.
template <typename T>
void CpuOperators<T>::add_product(const Operator& op, const Step& step, RowRange rows,
                                  int64_t begin, int64_t end, const void* input) {
  const Linear<T>& linear = a_.weights.matrix(op.weight);
  if (const float* bias = a_.weights.vector(op.bias); bias != nullptr) {
    const int64_t first = begin * kPackColumns;
    const int64_t last = std::min<int64_t>(end * kPackColumns, linear.columns());
    for (int32_t row = rows.begin; row < rows.end; ++row) {
      float* out = a_.template at<float>(op.output, step, row);
      for (int64_t i = first; i < last; ++i)
        out[i] += bias[i];
    }
  }
  linear.multiply(begin, end, rows.end - rows.begin, input,
                  a_.template at<float>(op.output, step, rows.begin), linear.columns(), true);
}

template <typename T>
void CpuOperators<T>::rope(const Operator& op, const Step& step, RowRange rows) {
  const int32_t block_tokens = a_.cache.layout().block_tokens;
  for (int32_t row = rows.begin; row < rows.end;) {
    const Sequence& s = a_.sequence_of(row);
    const int32_t slot = (s.context + row - s.row_begin) % block_tokens;
    const int32_t end = std::min({rows.end, s.row_end(), row + block_tokens - slot});
    rotate_queries(op, step, {row, end});
    store_keys_and_values(op, step, {row, end}, s);
    row = end;
  }
}

template <typename T>
RopeHead CpuOperators<T>::rope_heads(const Operator& op, int32_t norm, double scale,
                                     int64_t first) const {
  return {.bias = offset_or_null(a_.weights.vector(op.bias), first),
          .norm_weight = a_.weights.vector(norm),
          .norm_eps = op.eps,
          .inverse_rms = 0.0f,
          .scale = static_cast<float>(scale),
          .dim = a_.graph.attention.head_dim,
          .turning = a_.graph.tensor(op.rotary).columns};
}

template <typename T>
float CpuOperators<T>::inverse_rms(const Operator& op, int32_t norm, const float* row,
                                   int64_t first) const {
  if (norm < 0 || a_.graph.weights.weight(norm).rows() == a_.graph.attention.head_dim)
    return 0.0f;
  return row_kernels<T>().inverse_rms(
      row + first, offset_or_null(a_.weights.vector(op.bias), first),
      static_cast<int>(a_.graph.weights.weight(norm).rows()), op.eps);
}

template <typename T>
void CpuOperators<T>::rotate_queries(const Operator& op, const Step& step, RowRange rows) {
  const int32_t dim = a_.graph.attention.head_dim;
  // Scores are powers of two: the softmax takes exp2.
  const RopeHead heads = rope_heads(op, op.q_norm, std::numbers::log2e * op.scale, 0);
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    const float* cos = a_.template at<float>(op.rotary, step, row);
    const float* in = a_.template at<float>(op.input, step, row);
    T* q = a_.template at<T>(op.output, step, row);
    const float row_inverse_rms = inverse_rms(op, op.q_norm, in, 0);
    for (int32_t h = 0; h < a_.graph.attention.heads; ++h) {
      row_kernels<T>().rope(in + h * dim, head_of(heads, h, row_inverse_rms), cos,
                            cos + heads.turning / 2, q + h * dim);
    }
  }
}

// Keys and values of rows that lie in one block of the cache.
template <typename T>
void CpuOperators<T>::store_keys_and_values(const Operator& op, const Step& step, RowRange rows,
                                            const Sequence& s) {
  const RowKernels<T>& kernels = row_kernels<T>();
  const AttentionShape& shape = a_.graph.attention;
  const int32_t dim = shape.head_dim;
  const int32_t block_tokens = a_.cache.layout().block_tokens;
  const int32_t position = s.context + rows.begin - s.row_begin;
  const int32_t block = s.block_table[static_cast<size_t>(position / block_tokens)];
  const int32_t slot = position % block_tokens;
  const int32_t count = rows.end - rows.begin;
  // The step that begins a block and ends in it clears the rest: attention reads whole blocks.
  const int32_t first_row = std::max(step.row_begin, s.row_begin);
  const bool is_last = rows.end == std::min(step.row_end, s.row_end());
  const bool clears_rest = is_last && rows.begin - slot >= first_row && slot + count < block_tokens;
  const float* bias = a_.weights.vector(op.bias);
  const int64_t first_key = shape.q_columns();
  const RopeHead heads = rope_heads(op, op.k_norm, 1.0, first_key);
  thread_local std::vector<T> keys;
  keys.resize(static_cast<size_t>(count) * static_cast<size_t>(dim));
  thread_local std::vector<float> inverse_rms_of_rows;
  inverse_rms_of_rows.resize(static_cast<size_t>(count));
  for (int32_t r = 0; r < count; ++r) {
    inverse_rms_of_rows[static_cast<size_t>(r)] = inverse_rms(
        op, op.k_norm, a_.template at<float>(op.input, step, rows.begin + r), first_key);
  }
  for (int32_t h = 0; h < shape.kv_heads; ++h) {
    const int64_t k = first_key + int64_t{h} * dim;
    const int64_t v = k + shape.kv_columns();
    for (int32_t r = 0; r < count; ++r) {
      const float* cos = a_.template at<float>(op.rotary, step, rows.begin + r);
      kernels.rope(a_.template at<float>(op.input, step, rows.begin + r) + k,
                   head_of(heads, h, inverse_rms_of_rows[static_cast<size_t>(r)]), cos,
                   cos + heads.turning / 2, keys.data() + r * dim);
    }
    kernels.store_keys(keys.data(), count, dim, a_.cache.template key<T>(op.layer, block, h), slot,
                       block_tokens);
    kernels.store_values(a_.template at<float>(op.input, step, rows.begin) + v, shape.qkv_columns(),
                         offset_or_null(bias, v), count, dim,
                         a_.cache.template value<T>(op.layer, block, h), slot);
    if (clears_rest)
      a_.cache.template clear_values_from<T>(op.layer, block, h, slot + count);
  }
}

template <typename T>
std::vector<AttentionItem> CpuOperators<T>::attention_items(const Operator& op, const Step& step,
                                                            int threads) {
  std::vector<AttentionItem> items;
  const int32_t head_end = step.is_whole() ? a_.graph.parts(op) : step.part_end;
  const int32_t item_rows = attention_item_rows(step.rows(), a_.graph.attention.heads_per_kv(),
                                                head_end - step.part_begin, threads);
  // The rows of a sequence one after another for each head, whose keys stay in L2 meanwhile.
  for (int32_t first = step.row_begin; first < step.row_end;) {
    const Sequence& s = a_.sequence_of(first);
    const int32_t last = std::min(step.row_end, s.row_end());
    for (int32_t h = step.part_begin; h < head_end; ++h) {
      for (int32_t row = first; row < last; row += item_rows) {
        items.push_back({.row = row - step.base,
                         .rows = std::min(item_rows, last - row),
                         .position = s.context + (row - s.row_begin),
                         .kv_head = h,
                         .block_table = s.block_table.data()});
      }
    }
    first = last;
  }
  return items;
}

template <typename T>
AttentionArgs<T> CpuOperators<T>::attention_args(const Operator& op) {
  return {.cache = &a_.cache,
          .layer = op.layer,
          .num_heads = a_.graph.attention.heads,
          .window = op.window,
          .softcap = static_cast<float>(op.softcap * std::numbers::log2e),
          .q = a_.tensors[static_cast<size_t>(op.input)].template as<T>(),
          .out = a_.tensors[static_cast<size_t>(op.output)].template as<T>()};
}

template <typename T>
void CpuOperators<T>::residual(const Operator& op, const Step& step, RowRange rows) {
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    row_kernels<T>().add_scaled(a_.template at<float>(op.input, step, row),
                                a_.weights.vector(op.weight), a_.graph.output_of(op).columns,
                                op.eps, static_cast<float>(op.scale),
                                a_.template at<float>(op.output, step, row));
  }
}

template <typename T>
void CpuOperators<T>::round(const Operator& op, const Step& step, RowRange rows) {
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    row_kernels<T>().narrow(a_.template at<float>(op.input, step, row),
                            a_.graph.output_of(op).columns,
                            a_.template at<T>(op.output, step, row));
  }
}

template <typename T>
void CpuOperators<T>::score(const Operator& op, const Step& step, RowRange rows) {
  auto* scores = a_.tensors[static_cast<size_t>(op.output)].template as<PromptScore>();
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    const Sequence& s = a_.sequence_of(row);
    const int32_t target =
        row + 1 < s.row_end() ? a_.batch.tokens[static_cast<size_t>(row) + 1] : s.next_token;
    row_kernels<T>().score(a_.template at<float>(op.input, step, row), a_.graph.vocab_size, target,
                           scores[row]);
  }
}

template <typename T>
void CpuOperators<T>::choose(const Operator& op, const Step& step, RowRange rows) {
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    *a_.template at<int32_t>(op.output, step, row) =
        sample(row_kernels<float>(), a_.template at<float>(op.input, step, row),
               a_.graph.vocab_size, a_.sampling[static_cast<size_t>(row)]);
  }
}

// Rows are added in their order, whatever the steps: each column is one thread's.
template <typename T>
void CpuOperators<T>::pool(const Operator& op, const Step& step, RowRange rows, int64_t begin,
                           int64_t end) {
  const int64_t width = a_.graph.output_of(op).columns;
  const int64_t first = begin * kPackColumns;
  const int64_t last = std::min<int64_t>(end * kPackColumns, width);
  for (int32_t row = rows.begin; row < rows.end; ++row) {
    const int32_t index = a_.sequence_of_row[static_cast<size_t>(row)];
    const Sequence& s = a_.sequence_of(row);
    const float* in = a_.template at<float>(op.input, step, row);
    float* out = a_.template at<float>(op.output, step, index);
    if (row == s.row_begin)
      std::fill(out + first, out + last, 0.0f);
    const float share = 1.0f / static_cast<float>(s.rows);
    for (int64_t i = first; i < last; ++i)
      out[i] += in[i] * share;
  }
}

template class CpuOperators<float>;
template class CpuOperators<Bf16>;

}  // namespace flowprefill
