// Every CUDA call of real programs made to fail, one after another: one failed run, all others
// right to the bit, nothing left behind. And what bad input is answered with.
#include <gtest/gtest.h>

#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr size_t kEvery = 7;  // each run is some ten times slower
#else
constexpr size_t kEvery = 1;
#endif

// Not one that a GEMM kernel may refuse a product with: another kernel would take it.
constexpr cudaError_t kFault = cudaErrorIllegalState;

class ModelFaultTest : public ModelTest {
 protected:
  struct Outcome {
    size_t num_failed = 0;
    size_t num_calls = 0;
    size_t num_faults = 0;
    std::string call = {};  // that was made to fail
    std::string errors = {};
  };

  void SetUp() override {
    ModelTest::SetUp();
    options_.num_lanes = 1;
    options_.buckets = {8};
    plan_options_.granularity = Granularity::kLayer;
    before_ = [this](Program& program, size_t segment) {
      if (is(program, 2) && segment == 1 && runs_.at(3)->state() == RunState::kReady)
        dispatch(3);
    };
  }

  Part part_of(uint32_t id) const {
    return {.sequence = static_cast<int32_t>(id), .tokens = tiny_.random_tokens(5, id % 2)};
  }

  // Run 1 is eager; 2 captures, is preempted and spilled by 3, and comes back; 4 replays. Then run
  // 5 must finish.
  Outcome execute_all(const std::function<void()>& inject) {
    before_launch_ = before_;
    make_model(tiny_);
    start();
    for (uint32_t id = 1; id <= 5; ++id)
      make(id, {part_of(id)});
    const size_t calls_before = fake_cudart::num_calls();
    inject();
    for (uint32_t id = 1; id <= 4; ++id)
      execute_to_end(id);
    Outcome outcome{.num_calls = fake_cudart::num_calls() - calls_before,
                    .num_faults = fake_cudart::num_faults(),
                    .call = fake_cudart::last_fault()};
    num_failed_captures_ = model_->graph_report().num_failed;
    execute_to_end(5);
    EXPECT_EQ(runs_.at(5)->state(), RunState::kFinished) << "the executor is dead";
    for (uint32_t id = 1; id <= 5; ++id) {
      if (runs_.at(id)->state() == RunState::kFailed) {
        ++outcome.num_failed;
        outcome.errors += runs_.at(id)->error();
      } else {
        expect_same(id);
      }
    }
    EXPECT_EQ(num_terminal(), 5u);
    tear_down();
    EXPECT_EQ(fake_cudart::live().handles(), 0) << fake_cudart::live().text();
    return outcome;
  }

  // The same bits as the first run with these tokens ever gave.
  void expect_same(uint32_t id) {
    const auto got = logits(id);
    const auto known = known_.emplace(id % 2, got);
    EXPECT_EQ(got, known.first->second) << "run " << id;
  }

  const TinyModel tiny_{Kind::kLlama, 2};
  HookedDevice::Hook before_;
  std::map<uint32_t, std::vector<std::vector<float>>> known_;
  uint64_t num_failed_captures_ = 0;
};

TEST_F(ModelFaultTest, fault_at_every_call_ends_as_one_failed_run_or_as_an_eager_segment) {
  const Outcome without = execute_all([] {});
  ASSERT_EQ(without.num_failed, 0u) << without.errors;
  expect_close(known_.at(1)[0], tiny_.logits(part_of(1).tokens), "run 1");
  ASSERT_GT(without.num_calls, 100u);
  size_t num_hit = 0;
  size_t num_fallbacks = 0;
  for (size_t n = 1; n <= without.num_calls; n += kEvery) {
    fake_cudart::reset();
    const Outcome outcome = execute_all([n] { fake_cudart::fail_call(n, kFault); });
    const bool is_free = outcome.call == "cudaFreeAsync" || outcome.call == "cudaGraphDestroy";
    EXPECT_EQ(outcome.num_failed + num_failed_captures_, is_free ? 0u : outcome.num_faults)
        << "call " << n << ", " << outcome.call << ": " << outcome.errors;
    num_hit += outcome.num_faults;
    num_fallbacks += num_failed_captures_;
    if (outcome.num_failed > 0) {
      EXPECT_NE(outcome.errors.find("cudaErrorIllegalState"), std::string::npos) << outcome.errors;
    }
    if (HasFailure())
      return;
  }
  EXPECT_GT(num_hit, without.num_calls / kEvery / 2);
  EXPECT_GT(num_fallbacks, 0u);
}

// No run to fail: whoever calls gets the error, and nothing stays.
TEST_F(ModelFaultTest, fault_at_every_call_of_the_set_up_is_thrown_and_leaves_nothing) {
  plan_options_.granularity = Granularity::kNone;
  const auto set_up = [&] {
    make_model(tiny_);
    start(plan_options_);
  };
  set_up();
  const size_t num_calls = fake_cudart::num_calls();
  tear_down();
  size_t num_thrown = 0;
  for (size_t n = 1; n <= num_calls; n += kEvery) {
    fake_cudart::reset();
    fake_cudart::fail_call(n, kFault);
    bool is_thrown = false;
    try {
      set_up();
    } catch (const CudaError& error) {
      is_thrown = true;
      EXPECT_EQ(error.code(), kFault);
    }
    num_thrown += is_thrown ? 1 : 0;
    // Freeing may fail unseen, and a capture that fails leaves its segment eager.
    const std::string call = fake_cudart::last_fault();
    const bool may_pass = fake_cudart::num_faults() == 0 || call == "cudaGraphDestroy" ||
                          call == "cudaEventDestroy" || call == "cudaFreeHost" ||
                          call == "cudaFreeAsync" || call == "cudaStreamDestroy" ||
                          call == "cudaStreamSynchronize" ||
                          (model_ != nullptr && model_->graph_report().num_failed > 0);
    EXPECT_TRUE(is_thrown || may_pass) << "call " << n << ", " << call;
    tear_down();
    EXPECT_EQ(fake_cudart::live().handles(), 0)
        << "call " << n << ", " << call << ": " << fake_cudart::live().text();
    if (HasFailure())
      return;
  }
  EXPECT_GT(num_thrown, num_calls / kEvery / 2);
}

TEST_F(ModelFaultTest, too_little_memory_is_told_by_whoever_takes_it) {
  const auto out_of_memory = [](const std::function<void()>& call) {
    try {
      call();
    } catch (const CudaError& error) {
      return error.is_out_of_memory();
    }
    return false;
  };
  fake_cudart::set_device_bytes(50'000);
  EXPECT_TRUE(out_of_memory([&] { CudaBackend model(tiny_.graph(), options_); }));
  fake_cudart::set_device_bytes(1 << 20);
  CudaBackend model(tiny_.graph(), options_);
  tiny_.load_into(model);
  EXPECT_TRUE(out_of_memory([&] { model.allocate_cache(kBlockTokens, 1'000'000); }));
  EXPECT_EQ(model.bytes_per_block(kBlockTokens), size_t{2} * 2 * 2 * 2 * 64 * kBlockTokens);
  EXPECT_GT(model.lane_bytes(kBlockTokens), size_t{64} * 64 * 4);
}

// ---- bad input

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
             {"operator rope of layer 0", "head_dim", "80", "64, 96 or 128"});
  expect_has(with([](auto& s, auto&) { s.hidden_size = 60; }), {"operator embed", "hidden", "60"});
  expect_has(with([](auto& s, auto&) { s.intermediate_size = 70; }),
             {"operator gate_up_proj of layer 0", "gated", "70", "multiple of 8"});
  expect_has(with([](auto&, auto& o) { o.run_ahead = 5; }), {"run_ahead", "5"});
  expect_has(with([](auto&, auto& o) { o.num_lanes = 0; }), {"num_lanes", "0"});
  expect_has(with([](auto&, auto& o) { o.buckets = {4, 4}; }), {"buckets", "4"});
  expect_has(with([](auto&, auto& o) { o.buckets = {65}; }), {"buckets", "65"});
  expect_has(with([](auto&, auto& o) { o.cuts.slices_heads = true; }), {"slices_heads"});
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
  expect_has(with("embed", [](auto&, auto& op) { op.scale = 8; }), {"operator embed: scale", "8"});
  expect_has(with("lm_head", [](auto&, auto& op) { op.softcap = 30; }),
             {"operator lm_head: softcap", "30"});
  expect_has(with("o_proj", [](auto&, auto& op) { op.scale = 0.5; }),
             {"operator o_proj of layer 1: scale", "0.5"});
  expect_has(with("gate_up_proj", [](auto&, auto& op) { op.activation = Activation::kGeluTanh; }),
             {"operator gate_up_proj of layer 1: activation", "gelu_tanh", "silu"});
  expect_has(with("attention", [](auto&, auto& op) { op.softcap = 50; }),
             {"operator attention of layer 1: softcap", "50"});
  expect_has(with("attn_norm",
                  [](auto& g, auto& op) {
                    op.kind = OperatorKind::kResidual;
                    op.output = op.input;
                    op.input = tensor_named(g, "normed");
                  }),
             {"operator attn_norm of layer 1: kind", "residual"});
  expect_has(with("mlp_norm", [](auto& g, auto&) { g.tensors[2].type = ElementType::kFloat; }),
             {"operator attn_norm of layer 0: normed type", "activation"});
  expect_has(with("rope",
                  [](auto& g, auto&) {
                    g.rotary_tables[0].inverse_frequencies.resize(16);
                    g.tensors[1].columns = 32;
                  }),
             {"operator rope of layer 0: rotary columns", "32", "64"});
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

TEST_F(ModelInputTest, injected_failure_ends_its_run_only) {
  const TinyModel tiny(Kind::kLlama, 1);
  plan_options_.granularity = Granularity::kOperator;
  make_model(tiny);
  start();
  const Part part{0, {}, tiny.random_tokens(5, 1)};
  make(1, {part}, {.fail_at = 3});
  execute_to_end(1);
  EXPECT_EQ(runs_.at(1)->state(), RunState::kFailed);
  expect_has(runs_.at(1)->error(), {"injected failure", "o_proj"});
  expect_close(execute(2, {part})[0], tiny.logits(part.tokens), "run 2");
}

}  // namespace
}  // namespace flowprefill::testing
