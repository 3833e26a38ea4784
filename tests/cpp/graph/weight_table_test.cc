// How tensors of a checkpoint become weights, and what of them is missing or wrong.
#include "graph/weight_table.h"

#include <gtest/gtest.h>

#include <stdexcept>

#include "graph_fixture.h"

namespace flowprefill::testing {
namespace {

template <typename Call>
std::string message(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void expect_has(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks '" << part << "'";
}

Weight matrix(const std::string& name, std::vector<WeightPart> parts,
              PartOrder order = PartOrder::kStacked) {
  return {.name = name, .columns = 3, .order = order, .parts = std::move(parts)};
}

WeightPart part(const std::string& source, int64_t rows, int64_t first_row = 0) {
  return {.source = source, .rows = rows, .first_row = first_row};
}

using Dealt = std::vector<std::tuple<int32_t, int32_t, float>>;

Dealt dealt(const WeightTable& table, const std::string& source, int64_t rows) {
  std::vector<float> values;
  for (int64_t row = 0; row < rows; ++row)
    values.insert(values.end(), 3, static_cast<float>(row));
  Dealt out;
  table.deal(source, values.data(), rows, 3, [&](int32_t weight, int32_t p, const float* first) {
    out.emplace_back(weight, p, *first);
  });
  return out;
}

TEST(WeightTable, a_tensor_goes_to_every_weight_that_takes_rows_of_it) {
  const WeightTable table({matrix("q", {part("fused", 4)}),
                           matrix("kv", {part("fused", 2, 4), part("other", 5)}),
                           matrix("again", {part("other", 5)})});
  EXPECT_EQ(dealt(table, "fused", 6), (Dealt{{0, 0, 0.0f}, {1, 0, 4.0f}}));
  EXPECT_EQ(dealt(table, "other", 5), (Dealt{{1, 1, 0.0f}, {2, 0, 0.0f}}));
  EXPECT_EQ(table.weight(1).rows(), 7);
  EXPECT_EQ(table.index("again"), 2);
}

TEST(WeightTable, unknown_names_and_wrong_shapes_are_told) {
  const WeightTable table({matrix("q", {part("fused", 4)}), matrix("k", {part("fused", 2, 4)})});
  expect_has(message([&] { dealt(table, "nothing", 1); }), {"nothing"});
  expect_has(message([&] { dealt(table, "fused", 5); }), {"fused", "[5, 3]", "[6, 3]"});
  expect_has(message([&] { static_cast<void>(table.index("v")); }), {"weight v"});
}

TEST(WeightTable, a_tensor_that_has_not_come_is_told_with_its_shape) {
  const WeightTable table({matrix("q", {part("a", 4)}), matrix("k", {part("b", 2)})});
  EXPECT_NO_THROW(table.require_all({"a", "b"}));
  expect_has(message([&] { table.require_all({"a"}); }), {"b", "missing", "[2, 3]"});
}

TEST(WeightTable, weights_that_cannot_be_are_refused) {
  const auto made = [](std::vector<Weight> weights) {
    return message([&] { const WeightTable table(std::move(weights)); });
  };
  expect_has(made({matrix("q", {})}), {"weight q", "parts"});
  expect_has(made({matrix("q", {part("a", 0)})}), {"weight q", "part a"});
  expect_has(made({matrix("q", {part("a", 2, -1)})}), {"weight q", "part a"});
  expect_has(made({matrix("q", {part("a", 2)}), matrix("q", {part("b", 2)})}), {"q", "twice"});
  expect_has(made({matrix("g", {part("a", 2)}, PartOrder::kPaired)}), {"weight g", "paired"});
  expect_has(made({matrix("g", {part("a", 2), part("b", 3)}, PartOrder::kPaired)}), {"paired"});
  Weight vector = matrix("v", {part("a", 2)});
  vector.kind = WeightKind::kVector;
  expect_has(made({vector}), {"weight v", "columns", "3"});
  EXPECT_EQ(made({matrix("g", {part("a", 2), part("b", 2)}, PartOrder::kPaired)}), "");
}

// ---- the graph that names them

TEST(ModelGraph, operators_that_do_not_fit_their_tensors_and_weights_are_named) {
  const auto with = [](const std::string& name, auto change) {
    ModelGraph graph = llama_graph();
    for (Operator& op : graph.operators) {
      if (op.name == name && op.layer <= 0)
        change(graph, op);
    }
    return message([&] { static_cast<void>(checked(std::move(graph))); });
  };
  EXPECT_EQ(with("embed", [](auto&, auto&) {}), "");
  expect_has(with("o_proj", [](auto&, auto& op) { op.weight = 99; }), {"o_proj", "weight", "99"});
  expect_has(with("o_proj", [](auto&, auto& op) { op.input = -1; }), {"o_proj", "input", "-1"});
  expect_has(with("o_proj", [](auto& g, auto& op) { op.weight = g.weights.index("embed"); }),
             {"o_proj", "embed", "rows", "203", "64"});
  expect_has(with("gate_up_proj", [](auto&, auto& op) { op.epilogue = Epilogue::kStore; }),
             {"gate_up_proj", "rows", "144", "72"});
  expect_has(with("attention", [](auto& g, auto& op) { op.output = tensor_named(g, "gated"); }),
             {"attention", "gated", "72", "256"});
  expect_has(with("embed", [](auto& g, auto&) { g.attention.kv_heads = 3; }),
             {"num_kv_heads", "3"});
  expect_has(with("embed", [](auto& g, auto&) { g.num_layers = 3; }), {"layers", "2", "3"});
  expect_has(with("embed", [](auto& g, auto&) { g.tensors[1].name = "hidden"; }),
             {"tensor hidden", "once"});
}

TEST(ModelGraph, parts_are_kv_heads_of_attention_and_64_columns_of_products) {
  const ModelGraph graph = llama_graph();
  for (const Operator& op : graph.operators) {
    const std::string name = op.name;
    const int32_t parts = graph.parts(op);
    if (name == "attention") {
      EXPECT_EQ(parts, 2);
      EXPECT_EQ(graph.part_columns(op), 128);
    } else if (name == "lm_head") {
      EXPECT_EQ(parts, 4);
      EXPECT_EQ(graph.part_columns(op), 64);
    } else if (name == "gate_up_proj") {
      EXPECT_EQ(parts, 3) << "144 rows of the weight";
      EXPECT_EQ(graph.part_columns(op), 32);
    } else if (is_light(op)) {
      EXPECT_EQ(parts, 1) << name;
    }
  }
}

}  // namespace
}  // namespace flowprefill::testing
