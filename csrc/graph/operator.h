// Operator: one step of a model on tensors, as data, as coarse as a kernel. Part of a ModelGraph;
// the planner cuts and prices operators, a device's backend lowers them.
#pragma once

#include <array>
#include <cstdint>

namespace flowprefill {

enum class OperatorKind : uint8_t {
  kEmbed,      // output = scale * weight[token]
  kRotary,     // output = cos | sin of each row's position, by a table of the graph
  kNorm,       // output = rms_norm(input) * weight; from prompt to sequence rows: of the last rows
  kLinear,     // a product with a weight matrix, and its epilogue
  kRoute,      // output = the chosen experts of each row and, behind them, their weights
  kExperts,    // products with the rows' chosen experts only, and the epilogue: see below
  kRope,       // queries, keys and values: bias, norm, rotation; queries to output, the rest cached
  kAttention,  // output = softmax(input * keys) * values, causal
  kResidual,   // output += scale * input, or scale * rms_norm(input) * weight
  kRound,      // output = input, in the output's type: where a product's input has no norm
  kSample,     // output = the chosen tokens of logits
  kScore,      // output = what a PromptScore keeps of each row's logits
  kPool,       // output (a row a sequence) += input / rows of the sequence: its mean in the end
};

enum class Epilogue : uint8_t {
  kStore,  // output = scale * product + bias, or softcap * tanh(that / softcap)
  kAdd,    // output += product + bias
  kGate,   // output = activation(gate) * up; the weight has gate and up columns in pairs
};

// kExperts: the weight is one matrix of all experts, one below the other; all have equal columns.
// kGate: slot j of a row, [j * columns, (j + 1) * columns) of the output, is the gate of its j-th
// chosen expert; gate rows of all experts are one part of the paired weight, up rows the other.
// kAdd: output += weight of the expert * (slot of the input * its matrix), expert after expert in
// ascending order. A row's result does not depend on other rows.
enum class Activation : uint8_t { kSilu, kGeluTanh };

// Indices are those of the graph's tensors, weights and rotary tables; -1: none.
struct Operator {
  OperatorKind kind = OperatorKind::kNorm;
  const char* name = "";  // for timelines and messages; static lifetime: intern()
  int32_t layer = -1;     // -1: outside the layers
  int32_t input = -1;
  int32_t output = -1;
  int32_t rotary = -1;  // kRope: the tensor of cos | sin
  int32_t route = -1;   // kExperts: the output of kRoute
  int32_t table = -1;   // kRotary: the graph's rotary table
  int32_t weight = -1;
  int32_t bias = -1;    // kLinear's; kRope's: of the projection it reads, before the first rounding
  int32_t q_norm = -1;  // kRope: [head_dim] for a norm of each head, or all heads' columns at once
  int32_t k_norm = -1;
  Epilogue epilogue = Epilogue::kStore;
  Activation activation = Activation::kSilu;
  float eps = 0;             // of norms
  double scale = 1;          // see the kinds; kRope: of the scores, which it puts into the queries
  float softcap = 0;         // of scores (kAttention) or of the product (kLinear); 0: none
  int32_t window = 0;        // kAttention: keys that a row sees, its own included; 0: all before it
  int32_t experts = 0;       // kExperts: how many the weight has
  int32_t slots = 0;         // kRoute and kExperts: experts that a row has
  bool sums_to_one = false;  // kRoute: weights are the softmax of the chosen logits, not of all
};

// Whether rows can be computed apart from one another in any order.
constexpr bool is_row_wise(const Operator& op) {
  return op.kind != OperatorKind::kAttention && op.kind != OperatorKind::kPool;
}

// Whether it multiplies by a weight matrix.
constexpr bool is_product(const Operator& op) {
  return op.kind == OperatorKind::kLinear || op.kind == OperatorKind::kExperts;
}

// Whether it costs next to nothing compared with a product: it never gets a segment of its own.
constexpr bool is_light(const Operator& op) {
  return !is_product(op) && is_row_wise(op);
}

// Whether it changes what its output holds rather than writing it anew.
constexpr bool reads_output(const Operator& op) {
  return op.kind == OperatorKind::kResidual || op.kind == OperatorKind::kPool ||
         op.epilogue == Epilogue::kAdd;
}

// The tensors that it reads; -1: none in that place.
constexpr std::array<int32_t, 4> tensors_read(const Operator& op) {
  return {op.input, op.rotary, op.route, reads_output(op) ? op.output : -1};
}

// A copy of the name that lives as long as the process. Thread: any.
const char* intern(const char* name);

}  // namespace flowprefill
