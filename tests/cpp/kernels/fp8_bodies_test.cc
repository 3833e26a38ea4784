// The FP8 kernels' bodies against ATen: the cast to float8_e4m3fn over all of bf16, rows with
// zeros, subnormal numbers, NaN and infinities, and the epilogue with every option.
#include "devices/cuda/kernels/fp8_bodies.h"

#include <ATen/ops/amax.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/silu.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "simt.h"
#include "tensors.h"

namespace flowprefill {
namespace {

using simt::Thread;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

E4m3* codes(const at::Tensor& tensor) {
  return reinterpret_cast<E4m3*>(tensor.data_ptr<at::Float8_e4m3fn>());
}

bool is_nan(E4m3 code) {
  return (code.bits & 0x7f) == 0x7f;
}

// ATen's cast makes NaN of what is too large; ours, as the device's, saturates.
at::Tensor saturated(const at::Tensor& values) {
  return at::clamp(values, -kLargestE4m3, kLargestE4m3).to(at::kFloat8_e4m3fn);
}

TEST(E4m3, EveryBf16AndItsNeighboursAreRoundedAsAtenDoes) {
  const at::Tensor values = at::empty({3 * 65536}, at::kFloat);
  for (uint32_t i = 0; i < 65536; ++i) {
    for (uint32_t step = 0; step < 3; ++step)  // just below, at and just above
      floats(values)[3 * i + step] = float_of((i << 16) + step - 1);
  }
  const at::Tensor want = saturated(values);
  for (int64_t i = 0; i < values.numel(); ++i) {
    const E4m3 got = to_e4m3(floats(values)[i]);
    if (std::isnan(floats(values)[i])) {
      ASSERT_EQ(got.bits, 0x7f);
    } else {
      ASSERT_EQ(got.bits, codes(want)[i].bits) << floats(values)[i];
    }
  }
}

TEST(E4m3, TiesGoToTheEvenCodeAndSmallOnesToZero) {
  EXPECT_EQ(to_e4m3(17.0f).bits, to_e4m3(16.0f).bits);
  EXPECT_EQ(to_e4m3(19.0f).bits, to_e4m3(20.0f).bits);
  EXPECT_EQ(to_e4m3(0x1p-10f).bits, 0);      // half of the least
  EXPECT_EQ(to_e4m3(0x1.8p-9f).bits, 2);     // between 1 and 2 steps
  EXPECT_EQ(to_e4m3(-0x1p-11f).bits, 0x80);  // a zero keeps its sign
  EXPECT_EQ(to_e4m3(0x1.fp-7f).bits, 8);     // up into the normal numbers
  EXPECT_EQ(to_e4m3(464.0f).bits, 0x7e);
  EXPECT_EQ(to_e4m3(-1e30f).bits, 0xfe);
  EXPECT_EQ(to_e4m3(kInfinity).bits, 0x7e);
}

TEST(E4m3, EveryCodeIsWidenedAsAtenDoesAndComesBack) {
  const at::Tensor all = at::empty({256}, at::kFloat8_e4m3fn);
  for (int i = 0; i < 256; ++i)
    codes(all)[i].bits = static_cast<uint8_t>(i);
  const at::Tensor want = all.to(at::kFloat);
  const at::Tensor halves = all.to(at::kHalf);
  for (int i = 0; i < 256; ++i) {
    const float got = widen(codes(all)[i]);
    if (is_nan(codes(all)[i])) {
      ASSERT_TRUE(std::isnan(got));
      ASSERT_GT(f16_of(codes(all)[i]) & 0x7fff, 0x7c00u) << "NaN in f16 too";
      continue;
    }
    ASSERT_EQ(bits_of(got), bits_of(floats(want)[i])) << i;
    ASSERT_EQ(f16_of(codes(all)[i]), halves.data_ptr<at::Half>()[i].x) << i;
    ASSERT_EQ(to_e4m3(got).bits, i);
    ASSERT_EQ(widen(to_bf16(got)), got) << "bf16 has it exactly";
  }
}

class Fp8Bodies : public testing::TestWithParam<uint32_t> {
 protected:
  Random random{GetParam()};

  // Codes and scales of in[:, :width].
  struct Quantised {
    at::Tensor codes, scales;
  };
  Quantised quantise(const at::Tensor& in, int32_t width, int32_t threads = 64) {
    const auto rows = static_cast<int32_t>(in.size(0));
    Quantised out{at::zeros({rows, width + 8}, at::kByte).view(at::kFloat8_e4m3fn),
                  nan_filled({rows}, at::kFloat)};
    const QuantiseArgs args{.in = bits(in),
                            .ld_in = in.size(1),
                            .out = codes(out.codes),
                            .ld_out = width + 8,
                            .scales = floats(out.scales),
                            .rows = rows,
                            .width = width};
    check(args);
    simt::launch({.x = rows, .threads = threads, .shared_bytes = 8, .seed = GetParam()},
                 [&](const Thread& t) { quantise_body(t, args); });
    return out;
  }
};

TEST_P(Fp8Bodies, RowsAreDividedByTheirLargestAndRoundedAsAtenDoes) {
  const int32_t rows = random.integer(1, 6);
  const int32_t width = 8 * random.integer(1, 150);
  const at::Tensor in = random.halves({rows, width + 8}, std::pow(10.0, random.integer(-30, 30)));
  const Quantised got = quantise(in, width);
  const at::Tensor wide = in.slice(1, 0, width).to(at::kFloat);
  const at::Tensor scales = at::amax(wide.abs(), {1}) / kLargestE4m3;
  expect_equal(got.scales, scales);
  const at::Tensor want = saturated(wide * scales.reciprocal().unsqueeze(1));
  expect_equal(got.codes.slice(1, 0, width).view(at::kByte), want.view(at::kByte));
  const at::Tensor behind = got.codes.slice(1, width, width + 8).view(at::kByte);
  expect_equal(behind, at::zeros({rows, 8}, at::kByte));
  // The step of normal numbers is an eighth, of subnormal ones 2^-9 of the scale.
  const at::Tensor back =
      got.codes.slice(1, 0, width).to(at::kDouble) * got.scales.to(at::kDouble).unsqueeze(1);
  const double least = floats(scales.max())[0] * 0x1p-10;
  expect_close(back, wide.to(at::kDouble), 1.0 / 16 + kFloatRounding, least);
}

TEST_P(Fp8Bodies, ARowsCodesDependOnItAlone) {
  const int32_t width = 8 * random.integer(1, 60);
  const at::Tensor in = random.halves({5, width}, 3.0);
  const Quantised all = quantise(in, width);
  for (int64_t row = 0; row < 5; ++row) {
    const Quantised one = quantise(in.slice(0, row, row + 1).contiguous(), width, 32);
    expect_equal(one.codes.view(at::kByte)[0], all.codes.view(at::kByte)[row]);
    EXPECT_EQ(floats(one.scales)[0], floats(all.scales)[row]);
  }
}

TEST_P(Fp8Bodies, ZerosSubnormalNumbersNanAndInfinitiesHaveTheirOwnRows) {
  const int32_t width = 8 * random.integer(2, 60);
  const int32_t at = random.integer(0, width - 1);
  const at::Tensor in = random.halves({6, width});
  const float odd[] = {0.0f, 1e-40f, std::nanf(""), kInfinity, -kInfinity, 3e38f};
  in.slice(0, 0, 2).zero_();
  for (int row = 1; row < 6; ++row)
    bits(in)[row * width + at] = to_bf16(odd[row]);
  const Quantised got = quantise(in, width);
  const E4m3* out = codes(got.codes);
  for (int row = 0; row < 6; ++row) {
    for (int32_t i = 0; i < width; ++i) {
      const E4m3 code = out[row * (width + 8) + i];
      ASSERT_EQ(is_nan(code), row >= 2 && row <= 4 && i == at) << "row " << row << ", " << i;
      const bool is_zero = row < 2 || (row == 5 && i != at);
      ASSERT_TRUE(!is_zero || widen(code) == 0.0f) << "row " << row;
    }
  }
  const float* scales = floats(got.scales);
  EXPECT_TRUE(scales[0] > 0 && std::isfinite(1 / scales[0]));
  EXPECT_EQ(scales[1], scales[0]);
  EXPECT_TRUE(std::isfinite(scales[2]) && std::isfinite(scales[5]));
  EXPECT_EQ(scales[3], kInfinity);
  EXPECT_EQ(out[5 * (width + 8) + at].bits, 0x7e);
}

TEST_P(Fp8Bodies, WidenIsExact) {
  const int32_t rows = random.integer(1, 5);
  const int32_t width = 8 * random.integer(1, 90);
  const at::Tensor in = random.floats({rows, width + 8}, 30.0).to(at::kFloat8_e4m3fn);
  const at::Tensor out = nan_filled({rows, width}, at::kBFloat16);
  const WidenArgs args{codes(in), width + 8, bits(out), width, rows, width};
  check(args);
  simt::launch({.x = rows, .y = (width + 255) / 256, .threads = 32, .seed = GetParam()},
               [&](const Thread& t) { widen_body(t, args); });
  expect_equal(out, in.slice(1, 0, width).to(at::kBFloat16));
}

TEST_P(Fp8Bodies, RescaleIsTheEpilogueOfAProduct) {
  const int32_t rows = random.integer(1, 5);
  const bool is_gated = random.coin();
  const bool is_gelu = random.coin();
  const bool is_float = !is_gated && random.coin();
  const bool adds = !is_gated && random.coin();
  const bool has_bias = random.coin();
  const bool has_scales = random.coin();
  const int32_t columns = 16 * random.integer(1, 40);
  const int32_t width = is_gated ? columns / 2 : columns;
  const at::Tensor in = random.floats({rows, columns + 8}, 50.0);
  const at::Tensor row_scales = random.floats({rows}).abs();
  const at::Tensor column_scales = random.floats({columns}).abs() * 0.02;
  const at::Tensor bias = random.floats({columns});
  const at::Tensor out = random.floats({rows, width + 8}).to(is_float ? at::kFloat : at::kBFloat16);
  const at::Tensor before = out.clone();
  const float scale = is_gated ? 1.0f : 0.25f;
  const RescaleArgs args{.in = floats(in),
                         .ld_in = columns + 8,
                         .row_scales = has_scales ? floats(row_scales) : nullptr,
                         .column_scales = has_scales ? floats(column_scales) : nullptr,
                         .bias = has_bias ? floats(bias) : nullptr,
                         .out = is_float ? static_cast<void*>(floats(out)) : bits(out),
                         .ld_out = width + 8,
                         .output = is_float ? GemmOutput::kFloat : GemmOutput::kBf16,
                         .adds_to_out = adds,
                         .is_gated = is_gated,
                         .is_gelu = is_gelu,
                         .scale = scale,
                         .rows = rows,
                         .columns = columns};
  check(args);
  simt::launch({.x = rows, .y = (width + 255) / 256, .threads = 32, .seed = GetParam()},
               [&](const Thread& t) { rescale_body(t, args); });
  at::Tensor want = in.slice(1, 0, columns).to(at::kDouble) * double{scale};
  if (has_scales)
    want = want * row_scales.to(at::kDouble).unsqueeze(1) * column_scales.to(at::kDouble);
  at::Tensor magnitude = want.abs();
  if (has_bias) {
    want = want + bias.to(at::kDouble);
    magnitude = magnitude + bias.abs();
  }
  if (is_gated) {
    const at::Tensor gate = want.slice(1, 0, columns, 2);
    const at::Tensor up = want.slice(1, 1, columns, 2);
    magnitude = magnitude.slice(1, 0, columns, 2) * magnitude.slice(1, 1, columns, 2);
    want = (is_gelu ? at::gelu(gate, "tanh") : at::silu(gate)) * up;
  }
  if (adds) {
    want = want + before.slice(1, 0, width).to(at::kDouble);
    magnitude = magnitude + before.slice(1, 0, width).to(at::kDouble).abs();
  }
  const at::Tensor got = out.slice(1, 0, width);
  const at::Tensor allowed =
      want.abs() * (is_float ? 0.0 : kBf16Rounding) + magnitude * (8 * kFloatRounding);
  expect_close(got, want, allowed, 1.0, 1e-30);
  expect_equal(out.slice(1, width, width + 8), before.slice(1, width, width + 8));
}

INSTANTIATE_TEST_SUITE_P(Seeds, Fp8Bodies, testing::Range(1u, 17u));

}  // namespace
}  // namespace flowprefill
