// How weights get to the device: in pieces, rounded, each to its place; and programs made on other
// threads while runs execute.
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "devices/cuda/backend/device_weights.h"
#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

// As bf16 has it.
float to_float(float value) {
  return widen(to_bf16(value));
}

class ModelWeightsTest : public ModelTest {
 protected:
  // Tensors whose values say which and which row they are: number + row % 128 / 256.
  static void load_numbered(DeviceWeights& weights, const ModelGraph& graph) {
    for (const Weight& weight : graph.weights.weights()) {
      float number = 1;
      for (const WeightPart& part : weight.parts) {
        std::vector<float> values;
        for (int64_t row = 0; row < part.rows; ++row)
          values.insert(values.end(), static_cast<size_t>(weight.columns),
                        number + static_cast<float>(row % 128) / 256);
        weights.load(part.source, values.data(), part.rows, weight.columns);
        number *= 2;
      }
    }
    weights.finish();
  }
};

TEST_F(ModelWeightsTest, tensors_in_many_pieces_lie_where_kernels_read_them) {
  const ModelGraph graph = TinyModel(Kind::kQwen, 1).graph();
  for (const size_t piece_bytes : {DeviceWeights::kPieceBytes, size_t{1200}}) {
    DeviceWeights weights(graph, 0, piece_bytes);
    load_numbered(weights, graph);
    const auto at = [&](const char* name, int64_t row, int64_t column) {
      const int32_t index = graph.weights.index(name);
      return widen(weights.matrix(index)[row * graph.weights.weight(index).columns + column]);
    };
    const auto vector_at = [&](const char* name, int64_t row) {
      return weights.vector(graph.weights.index(name))[row];
    };
    EXPECT_EQ(at("layers.0.qkv", 100, 63), to_float(1 + 100 / 256.0f));
    EXPECT_EQ(at("layers.0.qkv", 256 + 100, 0), to_float(2 + 100 / 256.0f));
    EXPECT_EQ(at("layers.0.qkv", 256 + 128 + 100, 5), to_float(4 + 100 / 256.0f));
    EXPECT_EQ(at("layers.0.gate_up", 2 * 70, 0), to_float(1 + 70 / 256.0f));
    EXPECT_EQ(at("layers.0.gate_up", 2 * 70 + 1, 63), to_float(2 + 70 / 256.0f));
    EXPECT_EQ(vector_at("layers.0.qkv_bias", 256 + 3), 2 + 3 / 256.0f);
    EXPECT_EQ(vector_at("layers.0.qkv_bias", 256 + 128 + 127), 4 + 127 / 256.0f);
    EXPECT_EQ(vector_at("layers.0.gate_up_bias", 2 * 71), 1 + 71 / 256.0f);
    EXPECT_EQ(vector_at("layers.0.gate_up_bias", 2 * 71 + 1), 2 + 71 / 256.0f);
    EXPECT_EQ(at("lm_head", 202, 63), to_float(1 + (202 % 128) / 256.0f));
    EXPECT_EQ(at("lm_head", 203, 0), 0.0f) << "padding, up to a multiple of 8";
    EXPECT_EQ(at("lm_head", 207, 63), 0.0f);
    EXPECT_EQ(weights.vector(-1), nullptr);
    EXPECT_DOUBLE_EQ(weights.turns_per_position(0)[0] * 6.283185307179586, 1.0);
    EXPECT_DOUBLE_EQ(weights.turns_per_position(0)[16] * 6.283185307179586, 0.01);
  }
}

TEST_F(ModelWeightsTest, offset_is_added_to_every_value_of_a_vector) {
  ModelGraph graph = TinyModel(Kind::kTied, 1).graph();
  std::vector<Weight> changed = graph.weights.weights();
  const auto index = static_cast<size_t>(graph.weights.index("final_norm"));
  changed[index].offset = 1;
  graph.weights = WeightTable(changed);
  DeviceWeights weights(graph, 0);
  load_numbered(weights, graph);
  EXPECT_EQ(weights.vector(static_cast<int32_t>(index))[3], 2 + 3 / 256.0f);
  EXPECT_EQ(weights.vector(graph.weights.index("layers.0.mlp_norm"))[3], 1 + 3 / 256.0f);
}

TEST_F(ModelWeightsTest, values_are_rounded_to_nearest_even_and_tied_embeddings_are_there_once) {
  const ModelGraph graph = TinyModel(Kind::kTied, 1).graph();
  const ModelGraph untied = TinyModel(Kind::kLlama, 1).graph();
  DeviceWeights weights(graph, 0);
  std::vector<float> values(203 * 64);
  values[0] = 1 + 1.0f / 256;          // half-way between 1 and 1 + 1 / 128: to the even one
  values[1] = 1 + 3.0f / 256;          // half-way between odd 1 + 1 / 128 and 1 + 2 / 128
  values[2] = 1 + 1.0f / 256 + 1e-6f;  // above half-way
  weights.load("embed", values.data(), 203, 64);
  EXPECT_THROW(weights.finish(), std::invalid_argument);
  FP_CUDA(cudaDeviceSynchronize());
  const Bf16* embed = weights.matrix(graph.weights.index("embed"));
  EXPECT_EQ(widen(embed[0]), 1.0f);
  EXPECT_EQ(widen(embed[1]), 1 + 2.0f / 128);
  EXPECT_EQ(widen(embed[2]), 1 + 1.0f / 128);
  EXPECT_EQ(weights.matrix(graph.weights.index("lm_head")), embed);
  EXPECT_EQ(DeviceWeights(untied, 0).bytes() - weights.bytes(), size_t{208} * 64 * 2);
}

TEST_F(ModelWeightsTest, models_that_share_weights_compute_the_same_whichever_ends_first) {
  const TinyModel tiny(Kind::kQwen, 2);
  auto first = std::make_unique<CudaBackend>(tiny.graph(), options_);
  EXPECT_THROW(CudaBackend(*first, options_), std::logic_error) << "not finished";
  tiny.load_into(*first);
  CudaBackendOptions elsewhere = options_;
  elsewhere.device = 1;
  EXPECT_THROW(CudaBackend(*first, elsewhere), std::invalid_argument);
  const size_t weights = fake_cudart::live().device_bytes;
  model_ = std::make_unique<CudaBackend>(*first, options_);
  EXPECT_EQ(fake_cudart::live().device_bytes, weights) << "nothing is copied";
  first.reset();
  model_->allocate_cache(kBlockTokens, kBlocks);
  start();
  const std::vector<int32_t> tokens = tiny.random_tokens(9, 3);
  expect_close(execute(1, {{0, {}, tokens}})[0], tiny.logits(tokens), "run");
}

// What ThreadSanitizer has to see: plans, pinned memory and lanes are shared with the executor.
TEST_F(ModelWeightsTest, programs_are_made_and_destroyed_on_any_thread_while_runs_execute) {
  const TinyModel tiny(Kind::kLlama, 1);
  make_model(tiny);
  start();
  std::atomic<bool> is_over{false};
  std::vector<std::thread> threads;
  for (int32_t i = 1; i <= 2; ++i) {
    threads.emplace_back([&, i] {
      for (int32_t rows = 1; !is_over; rows = rows % 20 + 1) {
        const auto program = program_of(batch_of({{i, {}, tiny.random_tokens(rows, 1)}}));
        EXPECT_GT(program->size(), 0u);
        EXPECT_GE(model_->graph_report().num_replayed, 0u);
        model_->kv()->zero(batch_of({{i, {}, {1}}}).sequences[0].block_table);
      }
    });
  }
  const std::vector<int32_t> tokens = tiny.random_tokens(9, 3);
  for (uint32_t id = 1; id <= 10; ++id)
    expect_close(execute(id, {{0, {}, tokens}})[0], tiny.logits(tokens), "run");
  is_over = true;
  for (std::thread& thread : threads)
    thread.join();
}

}  // namespace
}  // namespace flowprefill::testing
