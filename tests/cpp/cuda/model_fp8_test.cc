// Whole models with weights in e4m3 on the doubles (but for `down`, whose 72 columns are no
// multiple of 16 and stay bf16): what is kept, what it takes, logits within what 8 bits err by, and
// the same bits from every cut and preemption.
#include <gtest/gtest.h>

#include <cstring>

#include "devices/cuda/backend/device_weights.h"
#include "model_fixture.h"

namespace flowprefill::testing {
namespace {

// A tensor as checkpoints of e4m3 store it: codes, then the row's scale.
std::vector<uint8_t> blocks(int64_t rows, int64_t columns) {
  std::vector<uint8_t> bytes;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      const auto code = static_cast<uint8_t>((row * 31 + i * 7) % 256);
      bytes.push_back((code & 0x7f) == 0x7f ? uint8_t{1} : code);
    }
    const float scale = 0.001f * static_cast<float>(1 + row);
    const auto* raw = reinterpret_cast<const uint8_t*>(&scale);
    bytes.insert(bytes.end(), raw, raw + sizeof scale);
  }
  return bytes;
}

using ModelFp8Test = ModelTest;

TEST_F(ModelFp8Test, logits_are_those_of_weights_and_rows_in_8_bits) {
  for (const Kind kind : {Kind::kLlama, Kind::kQwen}) {
    TinyModel tiny(kind, 2);
    options_.quantizes_fp8 = true;
    make_model(tiny);
    start();
    const std::vector<int32_t> tokens = tiny.random_tokens(12, 3);  // one tile
    const Logits got = execute(1, {{.tokens = tokens}});
    const std::vector<float> of_bf16 = tiny.logits(tokens);
    expect_close(got[0], of_bf16, "bf16", 0.8);
    tiny.quantise();
    expect_close(got[0], tiny.logits(tokens), "rounded alike", 0.1);
    EXPECT_NE(tiny.logits(tokens), of_bf16);
    const auto names = fake_kernels::ran();
    EXPECT_EQ(std::ranges::count(names, "quantise"), 2 * 3) << "qkv, o and gate_up of 2 layers";
    EXPECT_EQ(std::ranges::count(names, "rescale"), 0) << "12 rows: the products scale";
    tear_down();
    fake_cudart::reset();
    fake_kernels::reset();
  }
}

TEST_F(ModelFp8Test, every_cut_gives_the_same_bits) {
  const TinyModel tiny(Kind::kQwen, 2);
  options_.quantizes_fp8 = true;
  make_model(tiny);
  start();
  const std::vector<Part> parts = {{.sequence = 0, .tokens = tiny.random_tokens(26, 1)},
                                   {.sequence = 1, .tokens = tiny.random_tokens(7, 2)}};
  const Logits whole = execute(1, parts);
  uint32_t id = 1;
  for (const Granularity granularity :
       {Granularity::kLayer, Granularity::kOperator, Granularity::kBudget}) {
    plan_options_.granularity = granularity;
    plan_options_.budget_s = 1e-7;
    plan_options_.rates.weight_bytes_per_s = 1e11;
    EXPECT_EQ(execute(++id, parts), whole);
    EXPECT_EQ(execute(++id, parts), whole) << "again: captured, replayed";
  }
}

TEST_F(ModelFp8Test, preempted_at_every_boundary_by_operators_gives_the_same_bits) {
  options_.quantizes_fp8 = true;
  plan_options_.granularity = Granularity::kOperator;
  preempt_everywhere(TinyModel(Kind::kQwen, 1));
}

TEST_F(ModelFp8Test, preempted_at_every_boundary_within_a_budget_gives_the_same_bits) {
  options_.quantizes_fp8 = true;
  plan_options_.budget_s = 1e-7;
  plan_options_.rates.weight_bytes_per_s = 1e11;
  preempt_everywhere(TinyModel(Kind::kLlama, 1));
}

// But for the head, and `down` with its 72 columns: those stay bf16.
TEST_F(ModelFp8Test, weights_take_a_byte_each_and_the_planner_knows) {
  const TinyModel tiny(Kind::kLlama, 2);
  constexpr double kBytesPerSecond = 1e9;  // so slow that reading weights is all that counts
  plan_options_.rates.weight_bytes_per_s = kBytesPerSecond;
  struct Found {
    size_t bytes;
    double predicted_s;
  };
  const auto found = [&](bool quantises) {
    options_.quantizes_fp8 = quantises;
    model_.reset();
    make_model(tiny);
    const auto program = program_of(batch_of({{0, {}, {5}}}));
    double seconds = 0;
    for (size_t i = 0; i < program->size(); ++i)
      seconds += program->label(i).predicted_s;
    return Found{model_->weight_bytes(), seconds};
  };
  const Found plain = found(false);
  const Found quantised = found(true);
  const ModelGraph graph = tiny.graph();
  size_t saved = 0;  // of pieces of 256
  double read = 0;
  for (const char* name : {"qkv", "o", "gate_up"}) {
    for (const char* layer : {"layers.0.", "layers.1."}) {
      const Weight& weight = graph.weights.weight(graph.weights.index(std::string(layer) + name));
      const auto elements = static_cast<size_t>(weight.rows() * weight.columns);
      const auto bytes = elements + static_cast<size_t>(weight.rows()) * sizeof(float);
      saved += (2 * elements + 255) / 256 * 256 - (bytes + 255) / 256 * 256;
      read += static_cast<double>(2 * elements - bytes);
    }
  }
  EXPECT_EQ(plain.bytes - quantised.bytes, saved);
  EXPECT_NEAR((plain.predicted_s - quantised.predicted_s) * kBytesPerSecond, read, 1);
}

TEST_F(ModelFp8Test, codes_of_a_checkpoint_are_kept_as_they_are) {
  const ModelGraph graph = TinyModel(Kind::kLlama, 1).graph();
  const int32_t qkv = graph.weights.index("layers.0.qkv");
  const int32_t gate_up = graph.weights.index("layers.0.gate_up");
  CudaBackendOptions options;
  for (const int32_t index : {qkv, gate_up}) {
    for (const WeightPart& part : graph.weights.weight(index).parts)
      options.fp8_sources.push_back(part.source);
  }
  // Of these not all parts come so: bf16.
  options.fp8_sources.push_back("embed");
  for (const size_t piece_bytes : {DeviceWeights::kPieceBytes, size_t{1200}}) {
    DeviceWeights weights(graph, 0, piece_bytes, fp8_weights(graph, options));
    for (const Weight& weight : graph.weights.weights()) {
      for (const WeightPart& part : weight.parts) {
        const std::vector<float> ones(static_cast<size_t>(part.rows * weight.columns), 1.0f);
        const std::vector<uint8_t> bytes = blocks(part.rows, weight.columns);
        if (std::ranges::find(options.fp8_sources, part.source) != options.fp8_sources.end()) {
          weights.load_blocks(part.source, bytes.data(), part.rows, weight.columns + 4);
        } else {
          weights.load(part.source, ones.data(), part.rows, weight.columns);
        }
      }
    }
    weights.finish();
    EXPECT_TRUE(weights.is_fp8(qkv) && weights.is_fp8(gate_up));
    EXPECT_FALSE(weights.is_fp8(graph.weights.index("layers.0.down")));
    const int64_t columns = graph.weights.weight(qkv).columns;
    const auto code = [](int64_t row, int64_t column) {
      const auto value = static_cast<uint8_t>((row * 31 + column * 7) % 256);
      return (value & 0x7f) == 0x7f ? 1 : value;
    };
    const int64_t q_rows = graph.weights.weight(qkv).parts[0].rows;
    for (const int64_t column : {int64_t{0}, int64_t{13}, columns - 1}) {
      EXPECT_EQ(weights.codes(qkv)[5 * columns + column].bits, code(5, column));
      EXPECT_EQ(weights.codes(qkv)[(q_rows + 3) * columns + column].bits, code(3, column));
      EXPECT_EQ(weights.codes(gate_up)[(2 * 9) * columns + column].bits, code(9, column));
      EXPECT_EQ(weights.codes(gate_up)[(2 * 9 + 1) * columns + column].bits, code(9, column));
    }
    EXPECT_EQ(weights.scales(qkv)[q_rows + 3], 0.001f * 4);
    EXPECT_EQ(weights.scales(gate_up)[2 * 9 + 1], 0.001f * 10);
    const int32_t embed = graph.weights.index("embed");
    ASSERT_FALSE(weights.is_fp8(embed));
    EXPECT_EQ(weights.matrix(embed)[2 * columns + 3],
              to_bf16(widen(E4m3{static_cast<uint8_t>(code(2, 3))}) * (0.001f * 3)));
  }
}

TEST_F(ModelFp8Test, blocks_that_were_not_announced_or_have_another_shape_are_named) {
  const TinyModel tiny(Kind::kLlama, 1);
  options_.fp8_sources = {"layers.0.o"};
  CudaBackend model(tiny.graph(), options_);
  const std::vector<uint8_t> bytes = blocks(64, 128);
  EXPECT_THROW(model.load_blocks("layers.0.q", bytes.data(), 64, 132), std::logic_error);
  EXPECT_THROW(model.load_blocks("layers.0.o", bytes.data(), 3, 132), std::invalid_argument);
}

}  // namespace
}  // namespace flowprefill::testing
