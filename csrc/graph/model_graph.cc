#include "graph/model_graph.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>

#include "graph/prompt_score.h"
#include "runtime/thread_annotations.h"

namespace flowprefill {
namespace {

void require(bool holds, const std::string& field, int64_t value, const std::string& allowed) {
  if (!holds) {
    throw std::invalid_argument(field + ": got " + std::to_string(value) + ", expected " + allowed);
  }
}

// Checks one operator against the tensors and weights it names.
class OperatorCheck {
 public:
  OperatorCheck(const ModelGraph& graph, const Operator& op)
      : g_(graph), op_(op), name_("operator " + std::string(op.name) + ": ") {}

  void run() const {
    require_tensor("output", op_.output);
    switch (op_.kind) {
      case OperatorKind::kEmbed:
        require_weight("weight", op_.weight, g_.vocab_size, output().columns);
        return;
      case OperatorKind::kRotary:
        return check_rotary();
      case OperatorKind::kNorm:
        require_tensor("input", op_.input);
        require_columns("input", op_.input, output().columns);
        return require_weight("weight", op_.weight, output().columns, 1);
      case OperatorKind::kLinear:
        return check_linear();
      case OperatorKind::kRoute:
        require_tensor("input", op_.input);
        require(op_.slots >= 1 && op_.slots <= g_.tensor(op_.input).columns, name_ + "slots",
                op_.slots, "1.." + std::to_string(g_.tensor(op_.input).columns));
        return require_columns("output", op_.output, 2 * op_.slots);
      case OperatorKind::kExperts:
        return check_experts();
      case OperatorKind::kRope:
        return check_rope();
      case OperatorKind::kAttention:
        require_tensor("input", op_.input);
        require_columns("input", op_.input, g_.attention.q_columns());
        return require_columns("output", op_.output, g_.attention.q_columns());
      case OperatorKind::kResidual:
        require_tensor("input", op_.input);
        require_columns("input", op_.input, output().columns);
        if (op_.weight >= 0)
          require_weight("weight", op_.weight, output().columns, 1);
        return;
      case OperatorKind::kRound:
        require_tensor("input", op_.input);
        return require_columns("input", op_.input, output().columns);
      case OperatorKind::kSample:
        return require_tensor("input", op_.input);
      case OperatorKind::kScore:
        require_tensor("input", op_.input);
        require_columns("input", op_.input, g_.vocab_size);
        return require_columns("output", op_.output, PromptScore::kColumns);
      case OperatorKind::kPool:
        require_tensor("input", op_.input);
        return require_columns("input", op_.input, output().columns);
    }
  }

 private:
  const Tensor& output() const { return g_.output_of(op_); }

  void require_tensor(const char* field, int32_t index) const {
    require(index >= 0 && index < static_cast<int32_t>(g_.tensors.size()), name_ + field, index,
            "a tensor of the graph");
  }
  void require_columns(const char* field, int32_t index, int32_t columns) const {
    const Tensor& tensor = g_.tensor(index);
    require(tensor.columns == columns, name_ + field + " " + tensor.name + ": columns",
            tensor.columns, std::to_string(columns));
  }
  const Weight& weight(const char* field, int32_t index) const {
    require(index >= 0 && index < static_cast<int32_t>(g_.weights.weights().size()), name_ + field,
            index, "a weight of the graph");
    return g_.weights.weight(index);
  }
  void require_weight(const char* field, int32_t index, int64_t rows, int64_t columns) const {
    const Weight& w = weight(field, index);
    require(w.rows() == rows, name_ + field + " " + w.name + ": rows", w.rows(),
            std::to_string(rows));
    require(w.columns == columns, name_ + field + " " + w.name + ": columns", w.columns,
            std::to_string(columns));
  }

  void check_rotary() const {
    require(op_.table >= 0 && op_.table < static_cast<int32_t>(g_.rotary_tables.size()),
            name_ + "table", op_.table, "a rotary table of the graph");
    const RotaryTable& table = g_.rotary_tables[static_cast<size_t>(op_.table)];
    require_columns("output", op_.output,
                    2 * static_cast<int32_t>(table.inverse_frequencies.size()));
  }

  void check_linear() const {
    require_tensor("input", op_.input);
    const bool is_gate = op_.epilogue == Epilogue::kGate;
    const int64_t rows = int64_t{output().columns} * (is_gate ? 2 : 1);
    require_weight("weight", op_.weight, rows, g_.tensor(op_.input).columns);
    const bool is_paired = g_.weights.weight(op_.weight).order == PartOrder::kPaired;
    require(is_gate == is_paired, name_ + "weight: paired", is_paired ? 1 : 0,
            "gate and up rows in pairs exactly where the epilogue is gate");
    if (op_.bias >= 0)
      require_weight("bias", op_.bias, rows, 1);
  }

  // Each expert begins at a block of the stacked matrix.
  void check_experts() const {
    require_tensor("input", op_.input);
    require_tensor("route", op_.route);
    require(op_.slots >= 1, name_ + "slots", op_.slots, "at least 1");
    require_columns("route", op_.route, 2 * op_.slots);
    require(op_.experts >= op_.slots, name_ + "experts", op_.experts, "at least as many as slots");
    require(op_.epilogue != Epilogue::kStore, name_ + "epilogue: store", 1, "gate or add");
    require(op_.bias < 0, name_ + "bias", op_.bias, "none");
    const bool is_gate = op_.epilogue == Epilogue::kGate;
    const Tensor& slots = is_gate ? output() : g_.tensor(op_.input);
    require(slots.columns % op_.slots == 0, name_ + slots.name + ": columns", slots.columns,
            "a multiple of the slots");
    const int32_t inner = slots.columns / op_.slots;
    const int32_t made = is_gate ? 2 * inner : output().columns;
    require(made % kPartColumns == 0, name_ + output().name + ": columns of one expert",
            is_gate ? inner : made,
            "a multiple of " + std::to_string(is_gate ? kPartColumns / 2 : kPartColumns));
    require_weight("weight", op_.weight, int64_t{made} * op_.experts,
                   is_gate ? g_.tensor(op_.input).columns : inner);
    const bool is_paired = g_.weights.weight(op_.weight).order == PartOrder::kPaired;
    require(is_gate == is_paired, name_ + "weight: paired", is_paired ? 1 : 0,
            "gate and up rows in pairs exactly where the epilogue is gate");
  }

  void check_rope() const {
    const AttentionShape& a = g_.attention;
    require_tensor("input", op_.input);
    require_tensor("rotary", op_.rotary);
    require_columns("input", op_.input, a.qkv_columns());
    require_columns("output", op_.output, a.q_columns());
    const int32_t turning = g_.tensor(op_.rotary).columns;
    require(turning <= a.head_dim, name_ + "rotary: columns", turning,
            "at most head_dim = " + std::to_string(a.head_dim));
    if (op_.bias >= 0)
      require_weight("bias", op_.bias, a.qkv_columns(), 1);
    require((op_.q_norm < 0) == (op_.k_norm < 0), name_ + "k_norm", op_.k_norm,
            "one exactly where q_norm is");
    if (op_.q_norm < 0)
      return;
    const bool is_by_head = weight("q_norm", op_.q_norm).rows() == a.head_dim;
    require_weight("q_norm", op_.q_norm, is_by_head ? a.head_dim : a.q_columns(), 1);
    require_weight("k_norm", op_.k_norm, is_by_head ? a.head_dim : a.kv_columns(), 1);
  }

  const ModelGraph& g_;
  const Operator& op_;
  const std::string name_;
};

void check_numbers(const ModelGraph& g) {
  require(g.vocab_size > 0, "vocab_size", g.vocab_size, "at least 1");
  require(g.num_layers > 0, "num_layers", g.num_layers, "at least 1");
  const AttentionShape& a = g.attention;
  require(a.head_dim > 0 && a.head_dim % 2 == 0 && a.head_dim <= 512, "head_dim", a.head_dim,
          "an even number up to 512");
  require(a.heads > 0, "num_heads", a.heads, "at least 1");
  require(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "num_kv_heads", a.kv_heads,
          "a divisor of num_heads");
  require(g.tensors.size() <= kMaxTensors, "tensors", static_cast<int64_t>(g.tensors.size()),
          "at most " + std::to_string(kMaxTensors));
  std::set<std::string> names;
  for (const Tensor& tensor : g.tensors) {
    require(tensor.columns > 0, "tensor " + tensor.name + ": columns", tensor.columns,
            "at least 1");
    require(names.insert(tensor.name).second, "tensor " + tensor.name + ": named", 2, "once");
  }
}

// Layers must be whole, one after another, in order.
std::vector<int32_t> layers_of(const ModelGraph& g) {
  std::vector<int32_t> begins;
  int32_t layer = -1;
  const auto size = static_cast<int32_t>(g.operators.size());
  int32_t i = 0;
  for (; i < size && (layer < 0 || g.op(i).layer >= 0); ++i) {
    if (g.op(i).layer == layer)
      continue;
    require(g.op(i).layer == layer + 1, "operator " + std::string(g.op(i).name) + ": layer",
            g.op(i).layer, std::to_string(layer + 1));
    begins.push_back(i);
    ++layer;
  }
  require(layer + 1 == g.num_layers, "operators: layers", layer + 1, std::to_string(g.num_layers));
  begins.push_back(i);
  return begins;
}

void check_extents(const ModelGraph& g, ModelGraph::Range range, bool is_per_sequence) {
  for (int32_t i = range.begin; i < range.end; ++i) {
    require(g.is_per_sequence(g.op(i)) == is_per_sequence,
            "operator " + std::string(g.op(i).name) + ": rows are sequences",
            g.is_per_sequence(g.op(i)) ? 1 : 0, is_per_sequence ? "1" : "0, before the last layer");
  }
}

int32_t sequences_of(const ModelGraph& g) {
  int32_t i = g.layer_begin.back();
  while (i < static_cast<int32_t>(g.operators.size()) && !g.is_per_sequence(g.op(i)))
    ++i;
  return i;
}

// Behind the layers rows of the prompt go on in tiles of the head; scores and pools keep some of
// it.
void check_behind_layers(const ModelGraph& g) {
  for (int32_t i = g.layer_begin.back(); i < g.sequence_begin; ++i) {
    const Operator& op = g.op(i);
    const bool is_kept = op.kind == OperatorKind::kScore || op.kind == OperatorKind::kPool;
    require(is_kept || g.output_of(op).extent == Extent::kHeadTile,
            "operator " + std::string(op.name) + ": rows are sequences", 0,
            "1 behind the layers, or tiles of the head");
  }
}

uint64_t results_of(const ModelGraph& g) {
  uint64_t written = 0;
  uint64_t read = 0;
  for (int32_t i = g.layer_begin.back(); i < static_cast<int32_t>(g.operators.size()); ++i) {
    written |= uint64_t{1} << g.op(i).output;
    read |= g.op(i).input < 0 ? 0 : uint64_t{1} << g.op(i).input;
  }
  const int32_t logits = g.logits();
  return (written & ~read) | (logits < 0 ? 0 : uint64_t{1} << logits);
}

}  // namespace

const char* intern(const char* name) {
  static Mutex mutex;
  static std::set<std::string> names FP_GUARDED_BY(mutex);
  const MutexLock lock(mutex);
  return names.emplace(name).first->c_str();
}

ModelGraph checked(ModelGraph g) {
  check_numbers(g);
  for (const Operator& op : g.operators)
    OperatorCheck(g, op).run();
  g.layer_begin = layers_of(g);
  g.sequence_begin = sequences_of(g);
  check_extents(g, {0, g.sequence_begin}, false);
  check_behind_layers(g);
  check_extents(g, g.after_layers(), true);
  if (g.head() != nullptr)
    require(g.output_of(*g.head()).columns == g.vocab_size, "operator of the logits: columns",
            g.output_of(*g.head()).columns, "vocab_size = " + std::to_string(g.vocab_size));
  g.result_tensors = results_of(g);
  require(g.result_tensors != 0, "operators: results after the layers", 0, "1");
  return g;
}

const Operator* ModelGraph::head() const {
  for (auto i = static_cast<int32_t>(operators.size()); i-- > sequence_begin;) {
    if (op(i).kind == OperatorKind::kLinear)
      return &op(i);
  }
  return nullptr;
}

const Operator* ModelGraph::first_experts() const {
  const auto found = std::ranges::find(operators, OperatorKind::kExperts, &Operator::kind);
  return found == operators.end() ? nullptr : &*found;
}

int32_t ModelGraph::parts(const Operator& op) const {
  if (op.kind == OperatorKind::kAttention)
    return attention.kv_heads;
  if (op.kind == OperatorKind::kPool)
    return (output_of(op).columns + kPartColumns - 1) / kPartColumns;
  if (!is_product(op))
    return 1;
  const int64_t rows = weights.weight(op.weight).rows();
  return static_cast<int32_t>((rows + kPartColumns - 1) / kPartColumns);
}

int32_t ModelGraph::part_columns(const Operator& op) const {
  if (op.kind == OperatorKind::kAttention)
    return attention.heads_per_kv() * attention.head_dim;
  if (!is_product(op) && op.kind != OperatorKind::kPool)
    return output_of(op).columns;
  return op.epilogue == Epilogue::kGate ? kPartColumns / 2 : kPartColumns;
}

void check_operators(const ModelGraph& graph, RefusalOf& refusal_of) {
  for (const Operator& op : graph.operators) {
    if (const std::string reason = refusal_of(graph, op); !reason.empty()) {
      std::string message = std::string("operator ") + op.name;
      if (op.layer >= 0)
        message.append(" of layer ").append(std::to_string(op.layer));
      throw std::invalid_argument(message.append(": ").append(reason));
    }
  }
}

}  // namespace flowprefill
