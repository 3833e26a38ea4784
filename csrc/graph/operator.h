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

enum class Activation : uint8_t { kSilu, kGeluTanh };

// Indices are those of the graph's tensors, weights and rotary tables; -1: none.
struct Operator {
  OperatorKind kind = OperatorKind::kNorm;
  const char* name = "";  // for timelines and messages; static lifetime: intern()
  int32_t layer = -1;     // -1: outside the layers
  int32_t input = -1;
  int32_t output = -1;
  int32_t rotary = -1;  // kRope: the tensor of cos | sin
  int32_t table = -1;   // kRotary: the graph's rotary table
  int32_t weight = -1;
  int32_t bias = -1;    // kLinear's; kRope's: of the projection it reads, before the first rounding
  int32_t q_norm = -1;  // kRope: [head_dim] for a norm of each head, or all heads' columns at once
  int32_t k_norm = -1;
  Epilogue epilogue = Epilogue::kStore;
  Activation activation = Activation::kSilu;
  float eps = 0;       // of norms
  double scale = 1;    // see the kinds; kRope: of the scores, which it puts into the queries
  float softcap = 0;   // of scores (kAttention) or of the product (kLinear); 0: none
  int32_t window = 0;  // kAttention: keys that a row sees, its own included; 0: all before it
};

// Whether rows can be computed apart from one another in any order.
constexpr bool is_row_wise(const Operator& op) {
  return op.kind != OperatorKind::kAttention && op.kind != OperatorKind::kPool;
}

// Whether it costs next to nothing compared with a product: it never gets a segment of its own.
constexpr bool is_light(const Operator& op) {
  return op.kind != OperatorKind::kLinear && is_row_wise(op);
}

// Whether it changes what its output holds rather than writing it anew.
constexpr bool reads_output(const Operator& op) {
  return op.kind == OperatorKind::kResidual || op.kind == OperatorKind::kPool ||
         op.epilogue == Epilogue::kAdd;
}

// The tensors that it reads; -1: none in that place.
constexpr std::array<int32_t, 3> tensors_read(const Operator& op) {
  return {op.input, op.rotary, reads_output(op) ? op.output : -1};
}

// A copy of the name that lives as long as the process. Thread: any.
const char* intern(const char* name);

}  // namespace flowprefill
