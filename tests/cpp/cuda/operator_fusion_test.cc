// operators_to_fuse(): which operators one kernel may compute.
#include "devices/cuda/backend/operator_fusion.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string_view>

#include "../graph_fixture.h"

namespace flowprefill::testing {
namespace {

class OperatorFusionTest : public ::testing::Test {
 protected:
  int32_t index(std::string_view name) const {
    const auto found = std::ranges::find(graph_.operators, name, &Operator::name);
    return static_cast<int32_t>(found - graph_.operators.begin());
  }
  Operator& op(std::string_view name) { return graph_.operators[static_cast<size_t>(index(name))]; }
  OperatorFusion from(std::string_view name) const {
    const Step all{.last = static_cast<int32_t>(graph_.operators.size()) - 1};
    return operators_to_fuse(graph_, all, index(name)).value_or(OperatorFusion{});
  }

  ModelGraph graph_ = llama_graph({.num_layers = 1});
};

TEST_F(OperatorFusionTest, norms_and_ropes_go_with_their_products) {
  EXPECT_EQ(from("attn_norm").norm, index("attn_norm"));
  EXPECT_EQ(from("attn_norm").rope, index("rope"));
  EXPECT_EQ(from("qkv_proj").rope, index("rope"));
  EXPECT_EQ(from("mlp_norm").product, index("gate_up_proj"));
  EXPECT_EQ(from("o_proj").product, -1);
}

// Every block norms all of the stream, at any time: one that had added its product already would
// change what others norm.
TEST_F(OperatorFusionTest, a_product_that_is_added_to_what_was_normed_is_no_norm_s) {
  op("gate_up_proj").epilogue = Epilogue::kAdd;
  op("gate_up_proj").output = op("mlp_norm").input;
  EXPECT_EQ(from("mlp_norm").product, -1);
}

TEST_F(OperatorFusionTest, a_rope_that_turns_into_the_product_s_rows_is_no_product_s) {
  op("rope").output = op("qkv_proj").input;
  EXPECT_EQ(from("qkv_proj").product, -1);
  EXPECT_EQ(from("attn_norm").rope, index("rope")) << "the norms are not in memory then";
}

}  // namespace
}  // namespace flowprefill::testing
