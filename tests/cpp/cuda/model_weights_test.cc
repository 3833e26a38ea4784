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
  static void load_numbered(DeviceWeights& weights, const ModelConfig& c) {
    const auto load = [&](const std::string& name, int64_t rows, int64_t columns, float number) {
      std::vector<float> values;
      for (int64_t row = 0; row < rows; ++row)
        values.insert(values.end(), static_cast<size_t>(columns),
                      number + static_cast<float>(row % 128) / 256);
      weights.load(name, values.data(), rows, columns);
    };
    load("embed", c.vocab_size, c.hidden_size, 1);
    load("lm_head", c.vocab_size, c.hidden_size, 1);
    load("final_norm", c.hidden_size, 1, 1);
    for (const char* norm : {"attn_norm", "mlp_norm"})
      load(std::string("layers.0.") + norm, c.hidden_size, 1, 1);
    load("layers.0.q_norm", c.head_dim, 1, 1);
    load("layers.0.k_norm", c.head_dim, 1, 1);
    load("layers.0.q", c.q_columns(), c.hidden_size, 1);
    load("layers.0.k", c.kv_columns(), c.hidden_size, 2);
    load("layers.0.v", c.kv_columns(), c.hidden_size, 4);
    load("layers.0.q_bias", c.q_columns(), 1, 1);
    load("layers.0.k_bias", c.kv_columns(), 1, 2);
    load("layers.0.v_bias", c.kv_columns(), 1, 4);
    load("layers.0.o", c.hidden_size, c.q_columns(), 1);
    load("layers.0.o_bias", c.hidden_size, 1, 1);
    load("layers.0.gate", c.intermediate_size, c.hidden_size, 1);
    load("layers.0.up", c.intermediate_size, c.hidden_size, 2);
    load("layers.0.gate_bias", c.intermediate_size, 1, 1);
    load("layers.0.up_bias", c.intermediate_size, 1, 2);
    load("layers.0.down", c.hidden_size, c.intermediate_size, 1);
    load("layers.0.down_bias", c.hidden_size, 1, 1);
    weights.finish();
  }
};

TEST_F(ModelWeightsTest, tensors_in_many_pieces_lie_where_kernels_read_them) {
  const ModelConfig c = TinyModel(Kind::kQwen, 1).config();
  for (const size_t piece_bytes : {DeviceWeights::kPieceBytes, size_t{1200}}) {
    DeviceWeights weights(c, 0, piece_bytes);
    load_numbered(weights, c);
    const DeviceLayer& w = weights.layer(0);
    const auto at = [&](const Bf16* matrix, int64_t row, int64_t column, int64_t columns) {
      return widen(matrix[row * columns + column]);
    };
    const int32_t h = c.hidden_size;
    EXPECT_EQ(at(w.qkv, 100, h - 1, h), to_float(1 + 100 / 256.0f));
    EXPECT_EQ(at(w.qkv, 256 + 100, 0, h), to_float(2 + 100 / 256.0f));
    EXPECT_EQ(at(w.qkv, 256 + 128 + 100, 5, h), to_float(4 + 100 / 256.0f));
    EXPECT_EQ(at(w.gate_up, 2 * 70, 0, h), to_float(1 + 70 / 256.0f));
    EXPECT_EQ(at(w.gate_up, 2 * 70 + 1, h - 1, h), to_float(2 + 70 / 256.0f));
    EXPECT_EQ(w.qkv_bias[256 + 3], 2 + 3 / 256.0f);
    EXPECT_EQ(w.qkv_bias[256 + 128 + 127], 4 + 127 / 256.0f);
    EXPECT_EQ(w.gate_up_bias[2 * 71], 1 + 71 / 256.0f);
    EXPECT_EQ(w.gate_up_bias[2 * 71 + 1], 2 + 71 / 256.0f);
    EXPECT_EQ(at(weights.head(), 202, 63, h), to_float(1 + (202 % 128) / 256.0f));
    EXPECT_EQ(at(weights.head(), 203, 0, h), 0.0f) << "the vocabulary's padding";
    EXPECT_EQ(weights.padded_vocab(), 208);
    EXPECT_DOUBLE_EQ(weights.turns_per_position()[0] * 6.283185307179586, 1.0);
  }
}

TEST_F(ModelWeightsTest, values_are_rounded_to_nearest_even) {
  const ModelConfig c = TinyModel(Kind::kTied, 1).config();
  DeviceWeights weights(c, 0);
  std::vector<float> values(static_cast<size_t>(c.vocab_size * c.hidden_size));
  values[0] = 1 + 1.0f / 256;          // half-way between 1 and 1 + 1 / 128: to the even one
  values[1] = 1 + 3.0f / 256;          // half-way between odd 1 + 1 / 128 and 1 + 2 / 128
  values[2] = 1 + 1.0f / 256 + 1e-6f;  // above half-way
  weights.load("embed", values.data(), c.vocab_size, c.hidden_size);
  EXPECT_THROW(weights.finish(), std::invalid_argument);
  FP_CUDA(cudaDeviceSynchronize());
  EXPECT_EQ(widen(weights.embed()[0]), 1.0f);
  EXPECT_EQ(widen(weights.embed()[1]), 1 + 2.0f / 128);
  EXPECT_EQ(widen(weights.embed()[2]), 1 + 1.0f / 128);
  EXPECT_EQ(weights.head(), weights.embed());
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
        const auto program = model_->make_program(batch_of({{i, {}, tiny.random_tokens(rows, 1)}}),
                                                  plan_options_, {}, {});
        EXPECT_GT(program->size(), 0u);
        EXPECT_GE(model_->graph_report().num_replayed, 0u);
        model_->zero_blocks(batch_of({{i, {}, {1}}}).sequences[0].block_table);
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
