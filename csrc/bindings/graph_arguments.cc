#include "bindings/graph_arguments.h"

#include <initializer_list>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace flowprefill {
namespace {

template <typename V>
V field(const py::handle& object, const char* name) {
  const py::object value = object.attr(name);
  try {
    return value.cast<V>();
  } catch (const py::cast_error&) {
    throw std::invalid_argument(std::string(name) + ": got " + std::string(py::repr(value)) +
                                ", which has the wrong type or range");
  }
}

// The value that a field's text names.
template <typename E>
E named(const py::handle& object, const char* name,
        std::initializer_list<std::pair<const char*, E>> values) {
  const auto text = field<std::string>(object, name);
  std::string allowed;
  for (const auto& [key, value] : values) {
    if (text == key)
      return value;
    allowed += (allowed.empty() ? "" : ", ") + std::string(key);
  }
  throw std::invalid_argument(std::string(name) + ": got " + text + ", expected one of " + allowed);
}

Tensor tensor_of(const py::handle& object) {
  return {
      .name = field<std::string>(object, "name"),
      .columns = field<int32_t>(object, "columns"),
      .type = named<ElementType>(object, "type",
                                 {{"float", ElementType::kFloat},
                                  {"activation", ElementType::kActivation},
                                  {"product", ElementType::kProduct}}),
      .extent = named<Extent>(
          object, "extent",
          {{"prompt", Extent::kPrompt}, {"tile", Extent::kTile}, {"sequence", Extent::kSequence}})};
}

Weight weight_of(const py::handle& object) {
  Weight weight{
      .name = field<std::string>(object, "name"),
      .kind = named<WeightKind>(object, "kind",
                                {{"matrix", WeightKind::kMatrix},
                                 {"table", WeightKind::kTable},
                                 {"vector", WeightKind::kVector}}),
      .columns = field<int64_t>(object, "columns"),
      .order = named<PartOrder>(object, "order",
                                {{"stacked", PartOrder::kStacked}, {"paired", PartOrder::kPaired}}),
      .offset = field<float>(object, "offset"),
      .parts = {}};
  for (const py::handle part : object.attr("parts")) {
    weight.parts.push_back({.source = field<std::string>(part, "source"),
                            .rows = field<int64_t>(part, "rows"),
                            .first_row = field<int64_t>(part, "first_row")});
  }
  return weight;
}

// Indices of tensors and weights by name.
class Names {
 public:
  explicit Names(const ModelGraph& graph) : weights_(graph.weights) {
    for (size_t i = 0; i < graph.tensors.size(); ++i)
      tensors_[graph.tensors[i].name] = static_cast<int32_t>(i);
  }

  // -1 for an empty name.
  int32_t tensor(const py::handle& object, const char* name) const {
    const auto text = field<std::string>(object, name);
    if (text.empty())
      return -1;
    const auto found = tensors_.find(text);
    if (found == tensors_.end())
      throw std::invalid_argument(std::string(name) + ": got " + text + ", no tensor of the graph");
    return found->second;
  }
  int32_t weight(const py::handle& object, const char* name) const {
    const auto text = field<std::string>(object, name);
    return text.empty() ? -1 : weights_.index(text);
  }

 private:
  const WeightTable& weights_;
  std::map<std::string, int32_t> tensors_;
};

OperatorKind kind_of(const py::handle& object) {
  return named<OperatorKind>(object, "kind",
                             {{"embed", OperatorKind::kEmbed},
                              {"rotary", OperatorKind::kRotary},
                              {"norm", OperatorKind::kNorm},
                              {"linear", OperatorKind::kLinear},
                              {"route", OperatorKind::kRoute},
                              {"experts", OperatorKind::kExperts},
                              {"rope", OperatorKind::kRope},
                              {"attention", OperatorKind::kAttention},
                              {"residual", OperatorKind::kResidual},
                              {"round", OperatorKind::kRound}});
}

Operator operator_of(const py::handle& object, const Names& names) {
  return {.kind = kind_of(object),
          .name = intern(field<std::string>(object, "name").c_str()),
          .layer = field<int32_t>(object, "layer"),
          .input = names.tensor(object, "input"),
          .output = names.tensor(object, "output"),
          .rotary = names.tensor(object, "rotary"),
          .route = names.tensor(object, "route"),
          .table = field<int32_t>(object, "table"),
          .weight = names.weight(object, "weight"),
          .bias = names.weight(object, "bias"),
          .q_norm = names.weight(object, "q_norm"),
          .k_norm = names.weight(object, "k_norm"),
          .epilogue = named<Epilogue>(
              object, "epilogue",
              {{"store", Epilogue::kStore}, {"add", Epilogue::kAdd}, {"gate", Epilogue::kGate}}),
          .activation = named<Activation>(
              object, "activation",
              {{"silu", Activation::kSilu}, {"gelu_tanh", Activation::kGeluTanh}}),
          .eps = field<float>(object, "eps"),
          .scale = field<double>(object, "scale"),
          .softcap = field<float>(object, "softcap"),
          .window = field<int32_t>(object, "window"),
          .experts = field<int32_t>(object, "experts"),
          .slots = field<int32_t>(object, "slots"),
          .sums_to_one = field<bool>(object, "sums_to_one")};
}

}  // namespace

ModelGraph graph_from(const py::handle& object) {
  ModelGraph graph;
  graph.vocab_size = field<int32_t>(object, "vocab_size");
  graph.num_layers = field<int32_t>(object, "num_layers");
  graph.attention = {.heads = field<int32_t>(object, "num_heads"),
                     .kv_heads = field<int32_t>(object, "num_kv_heads"),
                     .head_dim = field<int32_t>(object, "head_dim")};
  for (const py::handle table : object.attr("rotary_tables")) {
    graph.rotary_tables.push_back(
        {.inverse_frequencies = field<std::vector<double>>(table, "inverse_frequencies"),
         .scale = field<double>(table, "scale")});
  }
  for (const py::handle tensor : object.attr("tensors"))
    graph.tensors.push_back(tensor_of(tensor));
  std::vector<Weight> weights;
  for (const py::handle weight : object.attr("weights"))
    weights.push_back(weight_of(weight));
  graph.weights = WeightTable(std::move(weights));
  const Names names(graph);
  for (const py::handle op : object.attr("operators"))
    graph.operators.push_back(operator_of(op, names));
  return checked(std::move(graph));
}

}  // namespace flowprefill
