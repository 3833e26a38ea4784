// Tensors of the kernel tests: random ones from a seed, bf16 as the bits kernels take, comparison
// within rounding. Used by every *_test.cc of this folder that compares with ATen.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/abs.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "devices/cuda/kernels/portable.h"

namespace flowprefill {

// Half a unit in the last place of bf16, relative: one rounding errs by no more.
constexpr double kBf16Rounding = 1.0 / 256;
// The same for a float that a handful of operations made.
constexpr double kFloatRounding = 1e-6;

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}

  int32_t integer(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(engine_);
  }
  bool coin() { return integer(0, 1) == 1; }

  // Normal numbers.
  at::Tensor floats(at::IntArrayRef shape, double scale = 1.0) {
    at::Tensor out = at::empty(shape, at::kFloat);
    std::normal_distribution<float> normal(0.0f, static_cast<float>(scale));
    for (int64_t i = 0; i < out.numel(); ++i)
      out.data_ptr<float>()[i] = normal(engine_);
    return out;
  }
  at::Tensor halves(at::IntArrayRef shape, double scale = 1.0) {
    return floats(shape, scale).to(at::kBFloat16);
  }

  std::vector<int32_t> permutation(int32_t count) {
    std::vector<int32_t> out(static_cast<size_t>(count));
    for (int32_t i = 0; i < count; ++i)
      out[static_cast<size_t>(i)] = i;
    std::shuffle(out.begin(), out.end(), engine_);
    return out;
  }

 private:
  std::mt19937 engine_;
};

inline Bf16* bits(const at::Tensor& tensor) {
  return reinterpret_cast<Bf16*>(tensor.data_ptr<at::BFloat16>());
}
inline float* floats(const at::Tensor& tensor) {
  return tensor.data_ptr<float>();
}
template <typename In>
In* elements(const at::Tensor& tensor) {
  if constexpr (std::is_same_v<In, Bf16>) {
    return bits(tensor);
  } else {
    return floats(tensor);
  }
}

inline at::Tensor nan_filled(at::IntArrayRef shape, at::ScalarType type) {
  return at::full(shape, std::nan(""), type);
}

inline int64_t count_finite(const at::Tensor& tensor) {
  return at::isfinite(tensor).sum().item<int64_t>();
}

// Expects |got - want| <= relative * scale + absolute everywhere; NaN in `got` fails.
inline void expect_close(const at::Tensor& got, const at::Tensor& want, const at::Tensor& scale,
                         double relative, double absolute) {
  ASSERT_EQ(got.sizes(), want.sizes());
  const at::Tensor excess =
      ((got.to(at::kDouble) - want).abs() - scale.abs() * relative - absolute).contiguous();
  for (int64_t i = 0; i < excess.numel(); ++i) {
    const double value = excess.data_ptr<double>()[i];
    ASSERT_TRUE(value <= 0.0) << "element " << i << " of " << excess.numel() << " errs by " << value
                              << " more than allowed";
  }
}

inline void expect_close(const at::Tensor& got, const at::Tensor& want, double relative,
                         double absolute) {
  expect_close(got, want, want, relative, absolute);
}

inline void expect_equal(const at::Tensor& got, const at::Tensor& want) {
  ASSERT_TRUE(got.equal(want));
}

}  // namespace flowprefill
