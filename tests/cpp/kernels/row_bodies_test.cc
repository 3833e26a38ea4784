// The row kernels' bodies against ATen on random shapes: embedding, rotary table, RMS norm,
// residual, rounding, cap, gate.
#include "devices/cuda/kernels/row_bodies.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/tanh.h>
#include <gtest/gtest.h>

#include <limits>

#include "simt.h"
#include "tensors.h"

namespace flowprefill {
namespace {

using simt::Thread;

class RowBodies : public testing::TestWithParam<uint32_t> {
 protected:
  Random random{GetParam()};
};

// Rows of which some are padding.
struct Rows {
  std::vector<int32_t> tokens, sequences, positions;

  Rows(Random& random, int32_t rows, int32_t vocab, int32_t longest) {
    for (int32_t i = 0; i < rows; ++i) {
      const bool is_padding = i > 0 && random.integer(0, 3) == 0;
      tokens.push_back(is_padding ? -1 : random.integer(0, vocab - 1));
      sequences.push_back(is_padding ? 0 : random.integer(1, 3));
      positions.push_back(is_padding ? -1 : random.integer(0, longest));
    }
  }
  BatchView view() const { return {tokens.data(), sequences.data(), positions.data(), nullptr, 0}; }
  at::Tensor mask() const {  // [rows, 1] 1: a token, 0: padding
    at::Tensor out = at::zeros({static_cast<int64_t>(tokens.size()), 1}, at::kDouble);
    for (size_t i = 0; i < tokens.size(); ++i)
      out.data_ptr<double>()[i] = tokens[i] >= 0;
    return out;
  }
};

TEST_P(RowBodies, EmbeddingEqualsAten) {
  const int32_t rows = random.integer(1, 9);
  const int32_t width = 8 * random.integer(1, 40);
  const at::Tensor table = random.halves({17, width});
  const Rows batch(random, rows, 17, 10);
  const at::Tensor out = nan_filled({rows, width}, at::kFloat);
  const float scale = random.coin() ? 1.0f : 12.5f;  // exact in float
  const EmbedArgs args{batch.view(), bits(table), width, floats(out), width, rows, width, scale};
  check(args);
  const int32_t parts = (width + 32 * kColumnsPerThread - 1) / (32 * kColumnsPerThread);
  simt::launch({.x = rows, .y = parts, .threads = 32, .seed = GetParam()},
               [&](const Thread& t) { embed_body(t, args); });
  at::Tensor indices = at::zeros({rows}, at::kLong);
  for (int32_t i = 0; i < rows; ++i)
    indices.data_ptr<int64_t>()[i] = std::max(0, batch.tokens[static_cast<size_t>(i)]);
  const at::Tensor want = at::embedding(table, indices).to(at::kDouble) * batch.mask() * scale;
  expect_equal(out, want.to(at::kFloat));
}

TEST_P(RowBodies, RotaryTableKeepsFloatPrecisionAtAMillionTokens) {
  const int32_t rows = random.integer(1, 6);
  const int32_t half = random.integer(1, 128);
  const Rows batch(random, rows, 10, 1 << 20);
  at::Tensor frequencies = at::empty({half}, at::kDouble);
  std::vector<double> turns;
  for (int32_t i = 0; i < half; ++i) {
    const double frequency = std::pow(1e4, -static_cast<double>(i) / half);
    frequencies.data_ptr<double>()[i] = frequency;
    turns.push_back(frequency / (2 * M_PI));
  }
  const at::Tensor out = nan_filled({rows, 2 * half}, at::kFloat);
  const float scale = 1.25f;
  const RotaryArgs args{batch.view(), turns.data(), scale, floats(out), rows, 2 * half};
  check(args);
  simt::launch({.x = rows, .threads = 64, .seed = GetParam()},
               [&](const Thread& t) { rotary_body(t, args); });
  at::Tensor positions = at::zeros({rows}, at::kDouble);
  for (int32_t i = 0; i < rows; ++i)
    positions.data_ptr<double>()[i] = batch.positions[static_cast<size_t>(i)];
  const at::Tensor angles = at::outer(positions, frequencies);
  const at::Tensor want = at::cat({at::cos(angles), at::sin(angles)}, 1) * scale * batch.mask();
  expect_close(out, want, 0.0, 3e-7);
}

// Launches the norm as kernels do and returns out.
template <typename Out>
at::Tensor run_norm(const RmsNormArgs<Out>& args, const at::Tensor& out, uint32_t seed) {
  check(args);
  simt::launch({.x = args.rows, .threads = 64, .shared_bytes = 8, .seed = seed},
               [&](const Thread& t) { rms_norm_body(t, args); });
  return out;
}

TEST_P(RowBodies, RmsNormIsAtensWithinRounding) {
  const int32_t rows = random.integer(1, 6);
  const int32_t width = 4 * random.integer(1, 300);
  const int32_t stride = width + 4 * random.integer(0, 3);
  const at::Tensor hidden = random.floats({rows, stride}, 3.0);
  const at::Tensor weight = random.floats({width});
  const at::Tensor out = nan_filled({rows, width}, at::kBFloat16);
  const auto norm = [&](auto* to, const at::Tensor& result) {
    run_norm(RmsNormArgs<std::remove_pointer_t<decltype(to)>>{.hidden = floats(hidden),
                                                              .ld_hidden = stride,
                                                              .weight = floats(weight),
                                                              .rows_in = nullptr,
                                                              .out = to,
                                                              .ld_out = width,
                                                              .rows = rows,
                                                              .width = width,
                                                              .eps = 1e-5f},
             result, GetParam());
  };
  norm(bits(out), out);
  const at::Tensor in = hidden.slice(1, 0, width).to(at::kDouble);
  const at::Tensor want = at::rms_norm(in, {width}, weight.to(at::kDouble), 1e-5);
  expect_close(out, want, kBf16Rounding + 2 * kFloatRounding, 1e-30);
  const at::Tensor unrounded = nan_filled({rows, width}, at::kFloat);
  norm(floats(unrounded), unrounded);
  expect_close(unrounded, want, 2 * kFloatRounding, 1e-30);
}

TEST_P(RowBodies, ResidualAddsAScaledBranchOrItsNorm) {
  const int32_t rows = random.integer(1, 6);
  const int32_t width = 4 * random.integer(1, 300);
  const int32_t stride = width + 4 * random.integer(0, 3);
  const bool has_norm = random.coin();
  const at::Tensor in = random.floats({rows, width}, 2.0);
  const at::Tensor weight = random.floats({width});
  const at::Tensor hidden = random.floats({rows, stride}, 3.0);
  const at::Tensor before = hidden.clone();
  const ResidualArgs args{.in = floats(in),
                          .ld_in = width,
                          .weight = has_norm ? floats(weight) : nullptr,
                          .hidden = floats(hidden),
                          .ld_hidden = stride,
                          .rows = rows,
                          .width = width,
                          .scale = 0.22f,
                          .eps = 1e-5f};
  check(args);
  simt::launch({.x = rows, .threads = 64, .shared_bytes = 8, .seed = GetParam()},
               [&](const Thread& t) { residual_body(t, args); });
  at::Tensor branch = in.to(at::kDouble);
  if (has_norm)
    branch = at::rms_norm(branch, {width}, weight.to(at::kDouble), 1e-5);
  const at::Tensor sum = before.slice(1, 0, width).to(at::kDouble) + branch * args.scale;
  expect_close(hidden.slice(1, 0, width), sum, 4 * kFloatRounding, 1e-5);
  expect_equal(hidden.slice(1, width, stride), before.slice(1, width, stride));
}

TEST_P(RowBodies, RoundIsTorchsRounding) {
  const int32_t rows = random.integer(1, 5);
  const int32_t width = 8 * random.integer(1, 70);
  const at::Tensor in = random.floats({rows, width + 8}, 100.0);
  const at::Tensor out = nan_filled({rows, width}, at::kBFloat16);
  const RoundArgs args{floats(in), width + 8, bits(out), width, rows, width};
  check(args);
  const int32_t parts = (width + 32 * kColumnsPerThread - 1) / (32 * kColumnsPerThread);
  simt::launch({.x = rows, .y = parts, .threads = 32, .seed = GetParam()},
               [&](const Thread& t) { round_body(t, args); });
  expect_equal(out, in.slice(1, 0, width).to(at::kBFloat16));
}

TEST_P(RowBodies, SoftcapIsAtensTanh) {
  const int32_t rows = random.integer(1, 5);
  const int32_t width = 4 * random.integer(1, 90);
  const at::Tensor values = random.floats({rows, width + 4}, 40.0);
  floats(values)[0] = 1e30f;
  floats(values)[1] = -1e30f;
  const at::Tensor before = values.clone();
  const SoftcapArgs args{floats(values), width + 4, rows, width, 30.0f};
  check(args);
  simt::launch({.x = rows, .y = (width + 127) / 128, .threads = 32, .seed = GetParam()},
               [&](const Thread& t) { softcap_body(t, args); });
  const at::Tensor in = before.slice(1, 0, width).to(at::kDouble);
  expect_close(values.slice(1, 0, width), at::tanh(in / 30.0) * 30.0, kFloatRounding, 2e-5);
  expect_equal(values.slice(1, width, width + 4), before.slice(1, width, width + 4));
}

TEST_P(RowBodies, RmsNormPicksRowsAndLeavesHiddenAlone) {
  const int32_t width = 4 * random.integer(1, 100);
  const at::Tensor hidden = random.floats({7, width});
  const at::Tensor before = hidden.clone();
  const at::Tensor weight = random.floats({width});
  const std::vector<int32_t> rows_in = {random.integer(0, 6), -1, random.integer(0, 6)};
  const at::Tensor out = nan_filled({3, width}, at::kBFloat16);
  run_norm<Bf16>({.hidden = floats(hidden),
                  .ld_hidden = width,
                  .weight = floats(weight),
                  .rows_in = rows_in.data(),
                  .out = bits(out),
                  .ld_out = width,
                  .rows = 3,
                  .width = width,
                  .eps = 1e-6f},
                 out, GetParam());
  expect_equal(hidden, before);
  for (int32_t i = 0; i < 3; ++i) {
    const int32_t row = rows_in[static_cast<size_t>(i)];
    const at::Tensor want =
        row < 0 ? at::zeros({width}, at::kDouble)
                : at::rms_norm(hidden[row].to(at::kDouble), {width}, weight.to(at::kDouble), 1e-6);
    expect_close(out[i], want, kBf16Rounding + 2 * kFloatRounding, 1e-30);
  }
}

template <typename In>
void test_gate(Random& random, uint32_t seed, at::ScalarType type) {
  const int32_t rows = random.integer(1, 5);
  const int32_t width = 8 * random.integer(1, 70);
  const int32_t stride = 2 * width + 8 * random.integer(0, 2);
  const at::Tensor in = random.floats({rows, stride}, 4.0).to(type);
  const at::Tensor out = nan_filled({rows, width}, at::kBFloat16);
  const bool is_gelu = random.coin();
  const GateArgs<In> args{elements<In>(in), stride, bits(out), width, rows, width, is_gelu};
  check(args);
  const int32_t parts = (width + 32 * kColumnsPerThread - 1) / (32 * kColumnsPerThread);
  simt::launch({.x = rows, .y = parts, .threads = 32, .seed = seed},
               [&](const Thread& t) { gate_body<In>(t, args); });
  const at::Tensor wide = in.to(at::kDouble);
  const at::Tensor gate = wide.slice(1, 0, 2 * width, 2);
  const at::Tensor up = wide.slice(1, 1, 2 * width, 2);
  const at::Tensor want = (is_gelu ? at::gelu(gate, "tanh") : at::silu(gate)) * up;
  // Where tanh is near -1, ATen's formula cancels even in double.
  expect_close(out, want, kBf16Rounding + 8 * kFloatRounding, is_gelu ? 1e-12 : 1e-30);
}

TEST_P(RowBodies, GateOfFloatsIsAtensWithinRounding) {
  test_gate<float>(random, GetParam(), at::kFloat);
}
TEST_P(RowBodies, GateOfBf16IsAtensWithinRounding) {
  test_gate<Bf16>(random, GetParam(), at::kBFloat16);
}

INSTANTIATE_TEST_SUITE_P(Seeds, RowBodies, testing::Range(1u, 13u));

TEST(Portable, PackRoundsAsTorchDoes) {
  Random random(5);
  const at::Tensor values = random.floats({4096}, 1e3);
  floats(values)[0] = std::numeric_limits<float>::infinity();
  floats(values)[1] = float_of(0x3f808000u);  // a tie: to even, down
  floats(values)[2] = float_of(0x3f818000u);  // a tie: to even, up
  floats(values)[3] = 3.4e38f;                // rounds to infinity
  const at::Tensor want = values.to(at::kBFloat16);
  for (int64_t i = 0; i < values.numel(); ++i) {
    ASSERT_EQ(to_bf16(floats(values)[i]), bits(want)[i]) << floats(values)[i];
    const uint32_t pair = pack_bf16(0.0f, floats(values)[i]);
    ASSERT_EQ(pair >> 16, bits(want)[i]);
  }
}

}  // namespace
}  // namespace flowprefill
