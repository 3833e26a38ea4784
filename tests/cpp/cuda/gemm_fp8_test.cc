// Products with weights in e4m3 through GemmSelector and its real candidates, over the doubles of
// the runtime and of the kernels: against sums in double of the codes, and of what they stand for.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "devices/cuda/backend/gemm_candidates.h"
#include "devices/cuda/kernels/fp8_args.h"
#include "devices/cuda/runtime/memory.h"
#include "devices/cuda/runtime/stream.h"
#include "fake_cudart.h"
#include "host_kernels.h"
#include "reference.h"

namespace flowprefill {
namespace {

struct Options {
  int32_t rows = 70;
  int32_t columns = 192;
  int32_t depth = 160;
  GemmOutput output = GemmOutput::kFloat;
  bool has_bias = false;
  bool adds_to_d = false;
  bool is_gated = false;
  float scale = 1;
};

class Fp8Products : public testing::Test {
 protected:
  void SetUp() override {
    fake_cudart::reset();
    fake_kernels::reset();
    fake_kernels::use_bodies(false);
  }

  void make(const Options& options) {
    of_ = options;
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    a_.resize(static_cast<size_t>(of_.rows * lda()));
    for (Bf16& value : a_)
      value = to_bf16(normal(random));
    codes_.resize(static_cast<size_t>(of_.columns * of_.depth));
    for (E4m3& code : codes_)
      code = to_e4m3(100 * normal(random));
    scales_.clear();
    bias_.clear();
    for (int32_t i = 0; i < of_.columns; ++i) {
      scales_.push_back(0.001f * (1 + std::abs(normal(random))));
      bias_.push_back(normal(random));
    }
    // They repeat: drawn one by one, those of many rows took most of a test's time.
    before_.resize(static_cast<size_t>(of_.rows * ldd()));
    const size_t drawn = std::min(before_.size(), size_t{1} << 16);
    std::ranges::generate_n(before_.begin(), static_cast<ptrdiff_t>(drawn),
                            [&] { return normal(random); });
    for (size_t i = drawn; i < before_.size(); ++i)
      before_[i] = before_[i - drawn];
  }

  int64_t lda() const { return of_.depth + 8; }
  int64_t ldd() const { return (of_.is_gated ? of_.columns / 2 : of_.columns) + 8; }

  // d and all before it, of rows [begin, end) and columns [from, to) of the operator.
  GemmArgs args(int32_t begin, int32_t end, int32_t from = 0, int32_t to = 0) {
    to = to == 0 ? of_.columns : to;
    const int32_t column = of_.is_gated ? from / 2 : from;
    void* d = of_.output == GemmOutput::kFloat ? static_cast<void*>(floats_.data() + column)
                                               : static_cast<void*>(halves_.data() + column);
    return {.a = a_.data(),
            .lda = lda(),
            .fp8 = {.b = codes_.data() + from * of_.depth, .b_scales = scales_.data() + from},
            .ldb = of_.depth,
            .bias = of_.has_bias ? bias_.data() + from : nullptr,
            .d = d,
            .ldd = ldd(),
            .output = of_.output,
            .adds_to_d = of_.adds_to_d,
            .is_gated = of_.is_gated,
            .scale = of_.scale,
            .row_begin = begin,
            .row_end = end,
            .columns = to - from,
            .depth = of_.depth,
            .operator_rows = of_.rows,
            .operator_columns = of_.columns};
  }

  void restore() {
    floats_ = before_;
    halves_.clear();
    for (const float value : before_)
      halves_.push_back(to_bf16(value));
  }

  std::unique_ptr<GemmSelector> selector(int compute_capability = 90) {
    return make_gemm_selector({.compute_capability = compute_capability, .num_multiprocessors = 8},
                              {});
  }

  void launch(const GemmSelector& gemms, const GemmArgs& product) {
    const DeviceBuffer scratch(gemms.scratch_bytes(product));
    gemms.prepare({&product, 1});
    const size_t before = fake_cudart::count("cudaLaunchKernel");
    gemms.launch(product, {scratch.get(), scratch.bytes()}, stream_.get());
    FP_CUDA(cudaStreamSynchronize(stream_.get()));
    const size_t launched = fake_cudart::count("cudaLaunchKernel") - before;
    EXPECT_EQ(static_cast<size_t>(gemms.num_kernels(product)), launched);
  }

  float d_at(int32_t row, int32_t column) const {
    const auto at = static_cast<size_t>(row * ldd() + column);
    return of_.output == GemmOutput::kFloat ? floats_[at] : widen(halves_[at]);
  }

  double element(int32_t row, int32_t column, bool quantises_row) const {
    const Bf16* x = a_.data() + row * lda();
    float most = 0;
    for (int32_t k = 0; k < of_.depth; ++k)
      most = std::max(most, std::abs(widen(x[k])));
    const float unit = most / 448;
    double sum = 0;
    for (int32_t k = 0; k < of_.depth; ++k) {
      const double weight = widen(codes_[static_cast<size_t>(column * of_.depth + k)]);
      const double rounded = double{unit} * widen(to_e4m3(widen(x[k]) * (1 / unit)));
      sum += weight * (quantises_row ? rounded : double{widen(x[k])});
    }
    return sum * scales_[static_cast<size_t>(column)] * of_.scale +
           (of_.has_bias ? bias_[static_cast<size_t>(column)] : 0.0f);
  }

  double want(int32_t row, int32_t column, bool quantises_row) const {
    const auto before = static_cast<size_t>(row * ldd() + column);
    if (of_.is_gated)
      return reference::silu(element(row, 2 * column, quantises_row)) *
             element(row, 2 * column + 1, quantises_row);
    const float added =
        of_.output == GemmOutput::kFloat ? before_[before] : widen(to_bf16(before_[before]));
    return element(row, column, quantises_row) + (of_.adds_to_d ? added : 0.0f);
  }

  // Of the codes: to the rounding of float and of d. Of rows that are not quantised: within what
  // e4m3 errs by, 1/16 of each product at most and about 1/40 in the mean, added up at random.
  void expect_right() {
    restore();
    launch(*selector(), args(0, of_.rows));
    const int32_t width = of_.is_gated ? of_.columns / 2 : of_.columns;
    const double own = of_.output == GemmOutput::kFloat ? 1e-5 : 1.0 / 256;
    double error = 0, size = 0;
    for (int32_t row = 0; row < of_.rows; ++row) {
      for (int32_t column = 0; column < width; ++column) {
        const double exact = want(row, column, true);
        ASSERT_NEAR(d_at(row, column), exact, own * std::abs(exact) + 2e-4);
        const double apart = d_at(row, column) - want(row, column, false);
        error += apart * apart;
        size += exact * exact;
      }
      for (int32_t column = width; column < width + 8; ++column) {
        const auto at = static_cast<size_t>(row * ldd() + column);
        ASSERT_EQ(floats_[at], before_[at]);
        ASSERT_EQ(halves_[at], to_bf16(before_[at]));
      }
    }
    EXPECT_LT(std::sqrt(error / size), of_.is_gated ? 0.08 : 0.04);
    EXPECT_GT(error, 0) << "rows were not quantised";
  }

  Options of_;
  std::vector<Bf16> a_, halves_;
  std::vector<E4m3> codes_;
  std::vector<float> scales_, bias_, before_, floats_;
  Stream stream_ = Stream::make();
};

TEST_F(Fp8Products, AreThoseOfCodesAndScalesInEveryEpilogue) {
  for (const GemmOutput output : {GemmOutput::kFloat, GemmOutput::kBf16}) {
    for (const bool is_second : {false, true}) {
      make({.output = output, .has_bias = is_second, .adds_to_d = is_second});
      expect_right();
    }
  }
  make({.scale = 0.25f});
  expect_right();
  for (const bool has_bias : {false, true}) {
    make({.output = GemmOutput::kBf16, .has_bias = has_bias, .is_gated = true});
    expect_right();
  }
}

TEST_F(Fp8Products, KernelsOwnBodiesComputeTheSame) {
  if (!fake_kernels::has_bodies())
    GTEST_SKIP() << "built for a sanitizer, without the bodies";
  fake_kernels::use_bodies(true);
  for (const int32_t rows : {9, 20}) {
    make({.rows = rows, .columns = 48, .depth = 48, .has_bias = true, .adds_to_d = true});
    expect_right();
    make({.rows = rows, .columns = 48, .depth = 48, .output = GemmOutput::kBf16, .is_gated = true});
    expect_right();
  }
}

// Of at most 16 rows: quantised, multiplied, and nothing else.
TEST_F(Fp8Products, OfFewRowsHaveAKernelThatScales) {
  const auto ran = [this](const Options& options) {
    make(options);
    fake_kernels::reset();
    fake_kernels::use_bodies(false);
    expect_right();
    return fake_kernels::ran();
  };
  const std::vector<std::string> two = {"quantise", "gemm"};
  for (const bool is_second : {false, true}) {
    EXPECT_EQ(ran({.rows = 16, .has_bias = is_second, .adds_to_d = !is_second}), two);
    EXPECT_EQ(ran({.rows = 5,
                   .output = GemmOutput::kBf16,
                   .has_bias = !is_second,
                   .adds_to_d = !is_second,
                   .is_gated = is_second}),
              two);
  }
  EXPECT_EQ(ran({.rows = 1, .scale = 0.25f}), two);
  EXPECT_EQ(ran({.rows = 17}),
            (std::vector<std::string>{"quantise", "widen", "widen", "gemm", "rescale"}));
}

TEST_F(Fp8Products, SlicesOfRowsAndColumnsHaveTheBitsOfTheWhole) {
  for (const auto& [rows, is_gated] : {std::pair{70, false}, {70, true}, {16, false}, {16, true}}) {
    make({.rows = rows,
          .output = is_gated ? GemmOutput::kBf16 : GemmOutput::kFloat,
          .has_bias = true,
          .adds_to_d = !is_gated,
          .is_gated = is_gated});
    const auto gemms = selector();
    restore();
    launch(*gemms, args(0, of_.rows));
    const std::vector<float> floats = floats_;
    const std::vector<Bf16> halves = halves_;
    restore();
    for (const auto& [begin, end] : {std::pair{0, 1}, {1, rows / 2}, {rows / 2, rows}}) {
      launch(*gemms, args(begin, end, 0, 64));
      launch(*gemms, args(begin, end, 64, 192));
    }
    EXPECT_EQ(floats_, floats);
    EXPECT_EQ(halves_, halves);
  }
}

// 1,024 rows of 72,000 bytes of sums are more than the scratch takes at once.
TEST_F(Fp8Products, ManyRowsPassThroughScratchInParts) {
  if (!fake_kernels::has_bodies())
    GTEST_SKIP() << "takes too long under a sanitizer";
  make({.rows = 4000, .columns = 17'664, .depth = 16});
  const auto gemms = selector();
  const size_t bytes = gemms->scratch_bytes(args(0, of_.rows));
  EXPECT_LT(bytes, size_t{300} << 20);
  floats_ = before_;
  // Three rows at the borders of a part, alone and with all others.
  const auto part = static_cast<int32_t>((int64_t{256} << 20) / (3 * 16 + 4 * 17'664) / 256 * 256);
  ASSERT_LT(part, of_.rows);
  launch(*gemms, args(part - 1, part + 2));
  const std::vector<float> alone(floats_.begin() + (part - 1) * ldd(),
                                 floats_.begin() + (part + 2) * ldd());
  floats_ = before_;
  launch(*gemms, args(0, part + 2));
  const std::vector<float> among(floats_.begin() + (part - 1) * ldd(),
                                 floats_.begin() + (part + 2) * ldd());
  EXPECT_EQ(alone, among);
  const auto names = fake_kernels::ran();
  EXPECT_EQ(std::ranges::count(names, "quantise"), 3);
}

TEST_F(Fp8Products, ARowWithNanOrInfinityIsNanAndOthersAreNot) {
  for (const int32_t rows : {3, 20}) {
    make({.rows = rows});
    a_[5] = to_bf16(std::nanf(""));
    a_[static_cast<size_t>(lda()) + 7] = to_bf16(INFINITY);
    restore();
    launch(*selector(), args(0, rows));
    for (int32_t column = 0; column < of_.columns; ++column) {
      ASSERT_TRUE(std::isnan(d_at(0, column)));
      ASSERT_TRUE(std::isnan(d_at(1, column)));
      ASSERT_TRUE(std::isfinite(d_at(2, column)));
    }
  }
}

TEST_F(Fp8Products, SidesThatNoKernelTakesAreNamed) {
  make({});
  restore();
  const auto refusal = [](const GemmArgs& product) -> std::string {
    try {
      check(product);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  GemmArgs product = args(0, 3);
  EXPECT_EQ(refusal(product), "");
  product.depth = 152;
  EXPECT_EQ(refusal(product), "depth: got 152, expected a multiple of 16 where weights are FP8");
  product = args(0, 3);
  product.columns = 8;
  EXPECT_EQ(refusal(product), "columns: got 8, expected a multiple of 16 where weights are FP8");
  product = args(0, 3);
  product.fp8.b_scales = nullptr;
  EXPECT_EQ(refusal(product), "b_scales: got 0, expected no null");
}

}  // namespace
}  // namespace flowprefill
