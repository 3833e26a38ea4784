// store_gated(), what the epilogue of the gated GEMMs does with a piece of a row; the kernels as a
// whole: gemm_kernels_test.cc.
#include "devices/cuda/kernels/gemm_gate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "reference.h"

namespace flowprefill {
namespace {

constexpr Bf16 kUntouched = 0x7fc1;  // a NaN that no rounding gives

void test_piece(const float* bias, bool is_gelu) {
  const float accumulators[8] = {1.5f, -2.0f, -3.0f, 0.25f, 100.0f, 1e-3f, -100.0f, 5.0f};
  alignas(16) Bf16 d[3 * 16];
  std::fill(std::begin(d), std::end(d), kUntouched);
  const GatedOutput out{d, 16, bias, 3, 16, is_gelu};
  store_gated(out, 1, 8, accumulators);
  for (int i = 0; i < 3 * 16; ++i) {
    if (i < 16 + 4 || i >= 16 + 8) {
      ASSERT_EQ(d[i], kUntouched) << i;
      continue;
    }
    const int at = 2 * (i - 16 - 4);
    const double gate = accumulators[at] + (bias ? bias[8 + at] : 0.0f);
    const double up = accumulators[at + 1] + (bias ? bias[8 + at + 1] : 0.0f);
    const double want = (is_gelu ? reference::gelu(gate) : reference::silu(gate)) * up;
    ASSERT_LE(std::abs(widen(d[i]) - want), std::abs(want) / 256 + 1e-6) << i;
  }
}

TEST(StoreGated, AddsTheBiasBeforeTheActivationAndRoundsOnce) {
  const std::vector<float> bias = {9, 9, 9, 9, 9, 9, 9, 9, 0.5f, 1.0f, -1.0f, 2.0f, 0, 1, 2, -3};
  for (const bool is_gelu : {false, true}) {
    test_piece(nullptr, is_gelu);
    test_piece(bias.data(), is_gelu);
  }
}

TEST(StoreGated, TouchesNothingBeyondRowsAndColumns) {
  const float accumulators[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  alignas(16) Bf16 d[32];
  std::fill(std::begin(d), std::end(d), kUntouched);
  const GatedOutput out{d, 8, nullptr, 2, 16, false};
  store_gated(out, 2, 0, accumulators);
  store_gated(out, 0, 16, accumulators);
  for (const Bf16 value : d)
    ASSERT_EQ(value, kUntouched);
}

}  // namespace
}  // namespace flowprefill
