// ModelGraph: a decoder model as data: tensors, operators, weights. Built by a family in Python
// (flowprefill/models/families), brought over the language border once at load by csrc/bindings;
// read by the planner and by the devices' backends.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "graph/operator.h"
#include "graph/tensor.h"
#include "graph/weight_table.h"

namespace flowprefill {

// Of every layer.
struct AttentionShape {
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;

  int32_t q_columns() const { return heads * head_dim; }
  int32_t kv_columns() const { return kv_heads * head_dim; }
  int32_t qkv_columns() const { return q_columns() + 2 * kv_columns(); }
  int32_t heads_per_kv() const { return heads / kv_heads; }
};

// Angles of rotary positions: position * inverse_frequencies[i], all scaling applied.
struct RotaryTable {
  std::vector<double> inverse_frequencies;  // half the dimensions of a head that turn
  double scale = 1.0;                       // multiplies cos and sin (yarn)
};

struct ModelGraph {
  int32_t vocab_size = 0;
  int32_t num_layers = 0;
  AttentionShape attention;
  std::vector<RotaryTable> rotary_tables;
  std::vector<Tensor> tensors;
  // In the order of execution: for all rows of the prompt (layer -1), then layer by layer, then
  // perhaps for all rows again (layer -1, see graph_variants.h), then for the sequences' last rows
  // (layer -1), which end with the product that makes the logits.
  std::vector<Operator> operators;
  WeightTable weights;

  const Operator& op(int32_t index) const { return operators[static_cast<size_t>(index)]; }
  const Tensor& tensor(int32_t index) const { return tensors[static_cast<size_t>(index)]; }
  const Tensor& output_of(const Operator& op) const { return tensor(op.output); }
  // Whether its rows are sequences.
  bool is_per_sequence(const Operator& op) const {
    return output_of(op).extent == Extent::kSequence && op.kind != OperatorKind::kPool;
  }

  // Whether it goes from rows of the prompt to rows of the sequences: it reads the last of each.
  bool is_gather(const Operator& op) const {
    return is_per_sequence(op) && tensor(op.input).extent == Extent::kPrompt;
  }

  // Operators [begin, end) of a part of the graph; checked() has found them.
  struct Range {
    int32_t begin = 0;
    int32_t end = 0;
  };
  Range before_layers() const { return {0, layer_begin.front()}; }
  Range layer(int32_t index) const {
    const auto i = static_cast<size_t>(index);
    return {layer_begin[i], layer_begin[i + 1]};
  }
  // Over all rows of the prompt, tile by tile; empty in a graph that only makes logits.
  Range rows_after_layers() const { return {layer_begin.back(), sequence_begin}; }
  // Over the sequences; empty where nothing is asked of their last rows.
  Range after_layers() const { return {sequence_begin, static_cast<int32_t>(operators.size())}; }
  std::vector<int32_t> layer_begin;  // [layers + 1] first operator of each, and behind the last
  int32_t sequence_begin = 0;        // first operator whose rows are sequences, or behind the last

  // The first product with experts; null in a graph without.
  const Operator* first_experts() const;
  // The product that makes the logits; null in a graph without.
  const Operator* head() const;
  // The tensor of the logits, -1 in a graph without.
  int32_t logits() const { return head() == nullptr ? -1 : head()->output; }
  // Tensors (bit i: tensor i) that are a run's result: the logits, and what is written outside of
  // the layers and never read.
  uint64_t results() const { return result_tensors; }
  uint64_t result_tensors = 0;

  // Into how many parts one operator may be cut, each for all its rows: attention by KV heads, a
  // product by blocks of kPartColumns rows of its weight, one expert's after the other's; 1: not at
  // all.
  int32_t parts(const Operator& op) const;
  // Columns of the output, or of each slot, that one part makes.
  int32_t part_columns(const Operator& op) const;
};

// Rows of a weight, columns of its product, in one part.
inline constexpr int32_t kPartColumns = 64;
inline constexpr int32_t kMaxTensors = 64;  // so that a set of them is one word

// The graph with the operators of its layers found. Throws std::invalid_argument naming the field
// or operator, its value and what is allowed.
ModelGraph checked(ModelGraph graph);

// Why a device does not take an operator; empty: it does.
using RefusalOf = std::string(const ModelGraph& graph, const Operator& op);

// Throws std::invalid_argument naming the first operator that is refused, its layer, and why.
void check_operators(const ModelGraph& graph, RefusalOf& refusal_of);

}  // namespace flowprefill
