// llama_graph(): a Llama-like ModelGraph of any size, as flowprefill/models/families/llama.py
// builds it; batches for it. Used by the C++ suites of the graph layer and of the devices.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "graph/batch.h"
#include "graph/model_graph.h"

namespace flowprefill::testing {

struct LlamaShape {
  int32_t vocab_size = 203;
  int32_t hidden_size = 64;
  int32_t intermediate_size = 72;
  int32_t num_layers = 2;
  int32_t num_heads = 4;
  int32_t num_kv_heads = 2;
  int32_t head_dim = 64;
  float rms_eps = 1e-5f;
  std::vector<int32_t> windows = {};  // by layer; those that are missing: 0
  bool qk_norm = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool tie_embeddings = false;
  int32_t experts = 0;  // of intermediate_size each; 0: one MLP
  int32_t slots = 0;

  int32_t q_columns() const { return num_heads * head_dim; }
  int32_t kv_columns() const { return num_kv_heads * head_dim; }
  int32_t qkv_columns() const { return q_columns() + 2 * kv_columns(); }
  int32_t window(int32_t layer) const {
    const auto i = static_cast<size_t>(layer);
    return i < windows.size() ? windows[i] : 0;
  }
  double inverse_frequency(int32_t i) const { return std::pow(10000.0, -2.0 * i / head_dim); }
};

// Builds the graph part by part.
class LlamaGraph {
 public:
  explicit LlamaGraph(const LlamaShape& shape) : s_(shape) {}

  ModelGraph build() {
    graph_.vocab_size = s_.vocab_size;
    graph_.num_layers = s_.num_layers;
    graph_.attention = {
        .heads = s_.num_heads, .kv_heads = s_.num_kv_heads, .head_dim = s_.head_dim};
    RotaryTable table;
    for (int32_t i = 0; i < s_.head_dim / 2; ++i)
      table.inverse_frequencies.push_back(s_.inverse_frequency(i));
    graph_.rotary_tables.push_back(std::move(table));
    add_tensors();
    add_operators();
    graph_.weights = WeightTable(std::move(weights_));
    return checked(std::move(graph_));
  }

 private:
  enum : int32_t {
    kHidden,
    kRotary,
    kNormed,
    kQkv,
    kQ,
    kContext,
    kGated,
    kLast,
    kLogits,
    kRouter,
    kRoute
  };

  void add_tensors() {
    const auto add = [this](const char* name, int32_t columns, ElementType type, Extent extent) {
      graph_.tensors.push_back({.name = name, .columns = columns, .type = type, .extent = extent});
    };
    add("hidden", s_.hidden_size, ElementType::kFloat, Extent::kPrompt);
    add("rotary", s_.head_dim, ElementType::kFloat, Extent::kPrompt);
    add("normed", s_.hidden_size, ElementType::kActivation, Extent::kTile);
    add("qkv", s_.qkv_columns(), ElementType::kProduct, Extent::kTile);
    add("q", s_.q_columns(), ElementType::kActivation, Extent::kTile);
    add("context", s_.q_columns(), ElementType::kActivation, Extent::kTile);
    add("gated", s_.intermediate_size * std::max(s_.slots, 1), ElementType::kActivation,
        Extent::kTile);
    add("last", s_.hidden_size, ElementType::kActivation, Extent::kSequence);
    add("logits", s_.vocab_size, ElementType::kFloat, Extent::kSequence);
    if (s_.experts > 0) {
      add("router", s_.experts, ElementType::kFloat, Extent::kTile);
      add("route", 2 * s_.slots, ElementType::kFloat, Extent::kTile);
    }
  }

  int32_t weight(const std::string& name, WeightKind kind, int64_t columns,
                 std::vector<WeightPart> parts, PartOrder order = PartOrder::kStacked) {
    weights_.push_back({.name = name,
                        .kind = kind,
                        .columns = columns,
                        .order = order,
                        .offset = 0,
                        .parts = std::move(parts)});
    return static_cast<int32_t>(weights_.size()) - 1;
  }
  int32_t matrix(const std::string& name, int64_t columns, std::vector<WeightPart> parts,
                 PartOrder order = PartOrder::kStacked) {
    return weight(name, WeightKind::kMatrix, columns, std::move(parts), order);
  }
  int32_t vector(const std::string& name, std::vector<WeightPart> parts,
                 PartOrder order = PartOrder::kStacked) {
    return weight(name, WeightKind::kVector, 1, std::move(parts), order);
  }
  int32_t vector_if(bool is_wanted, const std::string& name, std::vector<WeightPart> parts,
                    PartOrder order = PartOrder::kStacked) {
    return is_wanted ? vector(name, std::move(parts), order) : -1;
  }
  static WeightPart part(const std::string& source, int64_t rows) {
    return {.source = source, .rows = rows, .first_row = 0};
  }

  void add_operators() {
    const WeightPart embed = part("embed", s_.vocab_size);
    graph_.operators.push_back(
        {.kind = OperatorKind::kEmbed,
         .name = "embed",
         .output = kHidden,
         .weight = weight("embed", WeightKind::kTable, s_.hidden_size, {embed})});
    graph_.operators.push_back(
        {.kind = OperatorKind::kRotary, .name = "rotary", .output = kRotary, .table = 0});
    for (int32_t layer = 0; layer < s_.num_layers; ++layer) {
      add_attention(layer, "layers." + std::to_string(layer) + ".");
      if (s_.experts > 0)
        add_experts(layer, "layers." + std::to_string(layer) + ".");
      else
        add_mlp(layer, "layers." + std::to_string(layer) + ".");
    }
    add_norm("final_norm", "final_norm", -1, kLast);
    const WeightPart head = s_.tie_embeddings ? embed : part("lm_head", s_.vocab_size);
    graph_.operators.push_back({.kind = OperatorKind::kLinear,
                                .name = "lm_head",
                                .input = kLast,
                                .output = kLogits,
                                .weight = matrix("lm_head", s_.hidden_size, {head})});
  }

  void add_norm(const char* name, const std::string& weight, int32_t layer, int32_t output) {
    graph_.operators.push_back({.kind = OperatorKind::kNorm,
                                .name = name,
                                .layer = layer,
                                .input = kHidden,
                                .output = output,
                                .weight = vector(weight, {part(weight, s_.hidden_size)}),
                                .eps = s_.rms_eps});
  }

  void add_attention(int32_t layer, const std::string& p) {
    const int64_t q = s_.q_columns();
    const int64_t kv = s_.kv_columns();
    add_norm("attn_norm", p + "attn_norm", layer, kNormed);
    graph_.operators.push_back(
        {.kind = OperatorKind::kLinear,
         .name = "qkv_proj",
         .layer = layer,
         .input = kNormed,
         .output = kQkv,
         .weight = matrix(p + "qkv", s_.hidden_size,
                          {part(p + "q", q), part(p + "k", kv), part(p + "v", kv)})});
    graph_.operators.push_back(
        {.kind = OperatorKind::kRope,
         .name = "rope",
         .layer = layer,
         .input = kQkv,
         .output = kQ,
         .rotary = kRotary,
         .bias = vector_if(s_.qkv_bias, p + "qkv_bias",
                           {part(p + "q_bias", q), part(p + "k_bias", kv), part(p + "v_bias", kv)}),
         .q_norm = vector_if(s_.qk_norm, p + "q_norm", {part(p + "q_norm", s_.head_dim)}),
         .k_norm = vector_if(s_.qk_norm, p + "k_norm", {part(p + "k_norm", s_.head_dim)}),
         .eps = s_.rms_eps,
         .scale = 1 / std::sqrt(static_cast<double>(s_.head_dim))});
    graph_.operators.push_back({.kind = OperatorKind::kAttention,
                                .name = "attention",
                                .layer = layer,
                                .input = kQ,
                                .output = kContext,
                                .window = s_.window(layer)});
    graph_.operators.push_back(
        {.kind = OperatorKind::kLinear,
         .name = "o_proj",
         .layer = layer,
         .input = kContext,
         .output = kHidden,
         .weight = matrix(p + "o", q, {part(p + "o", s_.hidden_size)}),
         .bias = vector_if(s_.o_bias, p + "o_bias", {part(p + "o_bias", s_.hidden_size)}),
         .epilogue = Epilogue::kAdd});
  }

  void add_mlp(int32_t layer, const std::string& p) {
    const int64_t inner = s_.intermediate_size;
    add_norm("mlp_norm", p + "mlp_norm", layer, kNormed);
    graph_.operators.push_back(
        {.kind = OperatorKind::kLinear,
         .name = "gate_up_proj",
         .layer = layer,
         .input = kNormed,
         .output = kGated,
         .weight = matrix(p + "gate_up", s_.hidden_size,
                          {part(p + "gate", inner), part(p + "up", inner)}, PartOrder::kPaired),
         .bias = vector_if(s_.mlp_bias, p + "gate_up_bias",
                           {part(p + "gate_bias", inner), part(p + "up_bias", inner)},
                           PartOrder::kPaired),
         .epilogue = Epilogue::kGate});
    graph_.operators.push_back(
        {.kind = OperatorKind::kLinear,
         .name = "down_proj",
         .layer = layer,
         .input = kGated,
         .output = kHidden,
         .weight = matrix(p + "down", inner, {part(p + "down", s_.hidden_size)}),
         .bias = vector_if(s_.mlp_bias, p + "down_bias", {part(p + "down_bias", s_.hidden_size)}),
         .epilogue = Epilogue::kAdd});
  }

  void add_experts(int32_t layer, const std::string& p) {
    const int64_t inner = s_.intermediate_size;
    add_norm("mlp_norm", p + "mlp_norm", layer, kNormed);
    graph_.operators.push_back(
        {.kind = OperatorKind::kLinear,
         .name = "router",
         .layer = layer,
         .input = kNormed,
         .output = kRouter,
         .weight = matrix(p + "router", s_.hidden_size, {part(p + "router", s_.experts)})});
    graph_.operators.push_back({.kind = OperatorKind::kRoute,
                                .name = "route",
                                .layer = layer,
                                .input = kRouter,
                                .output = kRoute,
                                .slots = s_.slots});
    std::vector<WeightPart> gate_up;
    std::vector<WeightPart> down;
    for (const char* name : {"gate.", "up."}) {
      for (int32_t e = 0; e < s_.experts; ++e)
        gate_up.push_back(part(p + name + std::to_string(e), inner));
    }
    for (int32_t e = 0; e < s_.experts; ++e)
      down.push_back(part(p + "down." + std::to_string(e), s_.hidden_size));
    graph_.operators.push_back(
        {.kind = OperatorKind::kExperts,
         .name = "expert_gate_up",
         .layer = layer,
         .input = kNormed,
         .output = kGated,
         .route = kRoute,
         .weight = matrix(p + "gate_up", s_.hidden_size, std::move(gate_up), PartOrder::kPaired),
         .epilogue = Epilogue::kGate,
         .experts = s_.experts,
         .slots = s_.slots});
    graph_.operators.push_back({.kind = OperatorKind::kExperts,
                                .name = "expert_down",
                                .layer = layer,
                                .input = kGated,
                                .output = kHidden,
                                .route = kRoute,
                                .weight = matrix(p + "down", inner, std::move(down)),
                                .epilogue = Epilogue::kAdd,
                                .experts = s_.experts,
                                .slots = s_.slots});
  }

  const LlamaShape s_;
  ModelGraph graph_;
  std::vector<Weight> weights_;
};

inline ModelGraph llama_graph(const LlamaShape& shape = {}) {
  return LlamaGraph(shape).build();
}

// Index of a tensor by its name; -1: there is none.
inline int32_t tensor_named(const ModelGraph& graph, const std::string& name) {
  const auto found = std::ranges::find(graph.tensors, name, &Tensor::name);
  return found == graph.tensors.end() ? -1 : static_cast<int32_t>(found - graph.tensors.begin());
}

// Sequences of so many new tokens on top of so many old ones, without KV blocks.
inline Batch batch_with(const std::vector<std::pair<int32_t, int32_t>>& rows_and_context) {
  Batch batch;
  for (const auto& [rows, context] : rows_and_context) {
    batch.sequences.push_back(
        {.row_begin = batch.rows(), .rows = rows, .context = context, .block_table = {}});
    batch.tokens.resize(batch.tokens.size() + static_cast<size_t>(rows));
  }
  return batch;
}

}  // namespace flowprefill::testing
