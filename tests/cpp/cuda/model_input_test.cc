// What a model on CUDA answers bad input with: tensors, shapes, operators, options, batches, calls
// out of order.
#include <gtest/gtest.h>

#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

class ModelInputTest : public ModelTest {
 protected:
  // What the call throws; empty: nothing.
  template <typename Call>
  static std::string message(const Call& call) {
    try {
      call();
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  }
  static void expect_has(const std::string& text, const std::vector<std::string>& parts) {
    for (const std::string& part : parts)
      EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks '" << part << "'";
  }
};

TEST_F(ModelInputTest, tensor_unknown_of_wrong_shape_or_missing_is_named) {
  const TinyModel tiny(Kind::kTied, 2);
  CudaBackend model(tiny.graph(), options_);
  const std::vector<float> values(64 * 300);
  expect_has(message([&] { model.load("layers.2.q", values.data(), 256, 64); }), {"layers.2.q"});
  expect_has(message([&] { model.load("lm_head", values.data(), 203, 64); }), {"lm_head"});
  expect_has(message([&] { model.load("layers.0.q_bias", values.data(), 256, 1); }), {"q_bias"});
  expect_has(message([&] { model.load("layers.1.q", values.data(), 256, 63); }),
             {"layers.1.q", "[256, 63]", "[256, 64]"});
  expect_has(message([&] { model.load("final_norm", values.data(), 64, 64); }),
             {"final_norm", "[64, 64]", "[64, 1]"});
  model.load("embed", values.data(), 203, 64);
  expect_has(message([&] { model.finish(); }), {"layers.0.attn_norm", "missing", "[64, 1]"});
}

TEST_F(ModelInputTest, shape_or_options_that_no_kernel_takes_are_named) {
  const auto with = [&](auto change) {
    LlamaShape shape;
    CudaBackendOptions o = options_;
    change(shape, o);
    return message([&] { CudaBackend model(llama_graph(shape), o); });
  };
  EXPECT_EQ(with([](auto&, auto&) {}), "");
  expect_has(with([](auto& s, auto&) { s.head_dim = 80; }),
             {"operator rope of layer 0", "head_dim", "80", "64, 96, 128 or 256"});
  expect_has(with([](auto& s, auto&) { s.hidden_size = 60; }), {"operator embed", "hidden", "60"});
  expect_has(with([](auto& s, auto&) { s.intermediate_size = 70; }),
             {"operator gate_up_proj of layer 0", "gated", "70", "multiple of 8"});
  expect_has(with([](auto& s, auto&) {
               s.intermediate_size = 64;
               s.experts = 8;
               s.slots = 2;
             }),
             {"operator route of layer 0", "mixture of experts", "device cpu"});
  expect_has(with([](auto&, auto& o) { o.run_ahead = 5; }), {"run_ahead", "5"});
  expect_has(with([](auto&, auto& o) { o.num_lanes = 0; }), {"num_lanes", "0"});
  expect_has(with([](auto&, auto& o) { o.buckets = {4, 4}; }), {"buckets", "4"});
  expect_has(with([](auto&, auto& o) { o.buckets = {65}; }), {"buckets", "65"});
  fake_cudart::set_compute_capability(75);
  expect_has(with([](auto&, auto&) {}), {"device", "7.5", "8.0"});
}

TEST_F(ModelInputTest, operator_that_cuda_has_no_kernel_for_is_named) {
  const auto with = [&](const std::string& name, auto change) {
    ModelGraph graph = llama_graph({.qk_norm = true});
    const auto op = std::ranges::find_if(
        graph.operators, [&](const Operator& o) { return o.name == name && o.layer != 0; });
    change(graph, *op);
    return message([&] { CudaBackend model(graph, options_); });
  };
  const auto nothing = [](auto&, auto&) {};
  EXPECT_EQ(with("embed", nothing), "");
  expect_has(with("o_proj", [](auto&, auto& op) { op.scale = 0.5; }),
             {"operator o_proj of layer 1: scale", "0.5"});
  expect_has(with("gate_up_proj", [](auto&, auto& op) { op.softcap = 30; }),
             {"operator gate_up_proj of layer 1: softcap", "30"});
  expect_has(with("qkv_proj", [](auto&, auto& op) { op.softcap = 30; }),
             {"operator qkv_proj of layer 1: qkv type", "float"});
  expect_has(with("attn_norm",
                  [](auto& g, auto& op) {
                    op.kind = OperatorKind::kResidual;
                    op.output = op.input;
                    op.input = tensor_named(g, "normed");
                  }),
             {"operator attn_norm of layer 1: normed type", "float"});
  expect_has(with("final_norm", [](auto&, auto& op) { op.kind = OperatorKind::kRound; }),
             {"operator final_norm: output extent", "sequence"});
  expect_has(with("mlp_norm", [](auto& g, auto&) { g.tensors[2].type = ElementType::kFloat; }),
             {"operator qkv_proj of layer 0: normed type", "activation"});
  expect_has(with("rope",
                  [](auto& g, auto&) {
                    g.rotary_tables[0].inverse_frequencies.resize(15);
                    g.tensors[1].columns = 30;
                  }),
             {"operator rope of layer 0: rotary columns", "30", "multiple of 4"});
}

TEST_F(ModelInputTest, batch_that_does_not_fit_is_named) {
  const TinyModel tiny(Kind::kLlama, 1);
  make_model(tiny);
  const auto with = [&](const std::vector<Part>& parts, auto change) {
    Batch batch = batch_of(parts);
    change(batch);
    return message([&] { program_of(batch); });
  };
  const Part ok{0, {}, tiny.random_tokens(5, 1)};
  const auto nothing = [](Batch&) {};
  EXPECT_EQ(with({ok}, nothing), "");
  expect_has(with({ok}, [](Batch& b) { b.tokens[2] = 203; }), {"token id", "203", "0..202"});
  expect_has(with({ok}, [](Batch& b) { b.sequences[0].block_table.resize(1); }),
             {"sequence 0", "KV blocks", "1", "2"});
  expect_has(with({ok}, [](Batch& b) { b.sequences[0].block_table[1] = kBlocks; }),
             {"sequence 0", "KV block", "96", "0..95"});
  expect_has(with({ok}, [](Batch& b) { b.sequences[0].rows = 4; }), {"rows", "4", "5"});
  expect_has(with({ok}, [](Batch& b) { b.sequences[0].context = -1; }), {"context", "-1"});
  expect_has(with({ok}, [](Batch& b) { b.sequences[0].context = 44; }), {"49", "48"});
  expect_has(with({}, nothing), {"tokens", "0"});
  expect_has(with({{0, {}, tiny.random_tokens(65, 1)}}, nothing), {"tokens", "65", "64"});
  expect_has(with(std::vector<Part>(9, ok), nothing), {"sequences", "9", "8"});
  sampling_ = {{.temperature = -1}};
  expect_has(with({ok}, nothing), {"temperature", "-1"});
  sampling_ = {{}, {}};
  expect_has(with({ok}, nothing), {"sampling", "2", "1"});
}

TEST_F(ModelInputTest, calls_out_of_order_are_refused) {
  const TinyModel tiny(Kind::kLlama, 1);
  CudaBackend model(tiny.graph(), options_);
  EXPECT_THROW(model.make_device(), std::logic_error);
  EXPECT_EQ(model.kv(), nullptr);
  tiny.load_into(model);
  const std::vector<float> values(64);
  EXPECT_THROW(model.load("final_norm", values.data(), 64, 1), std::logic_error);
  EXPECT_THROW(model.make_program(batch_of({{0, {}, {1}}}), plan_options_, {}), std::logic_error);
  EXPECT_THROW(model.allocate_cache(3, 10), std::invalid_argument);
  EXPECT_THROW(model.allocate_cache(4, 0), std::invalid_argument);
  model.allocate_cache(4, 10);
  EXPECT_THROW(model.allocate_cache(4, 10), std::logic_error);
  const auto device = model.make_device();
  EXPECT_THROW(model.make_device(), std::logic_error);
}

}  // namespace
}  // namespace flowprefill::testing
