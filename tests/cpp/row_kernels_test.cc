// Tests of csrc/devices/cpu/row_kernels: every instruction set's kernels against double precision.
#include "devices/cpu/row_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "bf16.h"
#include "devices/cpu/isa.h"
#include "devices/cpu/row_kernel_tables.h"
#include "reference.h"

namespace flowprefill {

namespace {

struct Level {
  const char* name;
  const RowKernels<float>* kernels;
};

std::vector<Level> levels() {
  std::vector<Level> found{{"baseline", &isa_baseline::kRowKernelsF32}};
#if FP_ISA_LEVELS > 1
  const Isa best = available_isas().back();
  if (best >= Isa::kAvx2)
    found.push_back({"avx2", &isa_avx2::kRowKernelsF32});
  if (best >= Isa::kAvx512)
    found.push_back({"avx512", &isa_avx512::kRowKernelsF32});
  if (best >= Isa::kAvx512Bf16)
    found.push_back({"avx512bf16", &isa_avx512bf16::kRowKernelsF32});
#endif
  return found;
}

class RowKernelsTest : public testing::TestWithParam<Level> {
 protected:
  const RowKernels<float>& kernels() const { return *GetParam().kernels; }
};

std::vector<float> random_row(int n, float spread, unsigned seed = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> row(static_cast<size_t>(n));
  for (float& x : row)
    x = normal(random);
  return row;
}

// From -limit to limit, small numbers and zero included; 1009: no multiple of any vector's width.
std::vector<float> ramp(float limit) {
  std::vector<float> row;
  for (int i = -504; i <= 504; ++i) {
    const float x = static_cast<float>(i) / 504.0f;
    row.push_back(limit * x * std::fabs(x));
  }
  return row;
}

TEST_P(RowKernelsTest, GatesAreWithinFloatRounding) {
  const std::vector<float> gates = ramp(20.0f);
  const auto cols = static_cast<int>(gates.size());
  std::vector<float> tile = gates;
  tile.insert(tile.end(), gates.size(), 1.5f);
  std::vector<float> silu(gates.size());
  std::vector<float> geglu(gates.size());
  kernels().swiglu(tile.data(), 2 * cols, 1, cols, silu.data(), cols);
  kernels().geglu(tile.data(), 2 * cols, 1, cols, geglu.data(), cols);
  for (size_t i = 0; i < gates.size(); ++i) {
    const double x = gates[i];
    // An exponent's rounding grows with it; below -5 gelu is next to nothing.
    const double tolerance = 1e-6 * std::fabs(x) + 1e-9;
    EXPECT_NEAR(silu[i], 1.5 * reference::silu(x), tolerance) << x;
    EXPECT_NEAR(geglu[i], 1.5 * reference::gelu(x), tolerance) << x;
  }
}

TEST_P(RowKernelsTest, GatesOfInfinitiesAreTheirLimits) {
  const float huge = 1e30f;
  const std::vector<float> tile{-huge, huge, -200.0f, 200.0f, 1.0f, 1.0f, 1.0f, 1.0f};
  std::vector<float> out(4);
  kernels().geglu(tile.data(), 8, 1, 4, out.data(), 4);
  EXPECT_NEAR(out[0], 0.0f, 1e-6f);
  EXPECT_EQ(out[1], huge);
  EXPECT_NEAR(out[2], 0.0f, 1e-6f);
  EXPECT_EQ(out[3], 200.0f);
}

TEST_P(RowKernelsTest, SoftCapIsWithinFloatRoundingAndNeverBeyondTheCap) {
  for (const float cap : {0.5f, 30.0f, 72.13f}) {
    const std::vector<float> in = ramp(20.0f * cap);
    std::vector<float> out = in;
    kernels().soft_cap(out.data(), static_cast<int>(out.size()), cap);
    for (size_t i = 0; i < in.size(); ++i) {
      const double wanted = reference::soft_capped(in[i], cap);
      EXPECT_NEAR(out[i], wanted, 5e-7 * std::fabs(wanted)) << in[i];
      EXPECT_LE(std::fabs(out[i]), cap);
    }
  }
}

// [rows, columns] by plain sums; row-major with these strides.
double product_at(const Product<float>& p, int64_t row, int64_t column, double before) {
  double sum = p.add ? before : 0.0;
  for (int64_t k = 0; k < p.k; ++k)
    sum += double{p.a[row * p.lda + k]} * double{p.b[k * p.ldb + column]};
  return sum;
}

// Full tiles, rows and columns that fill none, one column, padding that must stay as it was.
TEST_P(RowKernelsTest, ProductsAreWithinFloatRounding) {
  constexpr int64_t kRows = 14;
  constexpr int64_t kDepth = 70;
  constexpr int64_t kPadding = 3;
  for (const int64_t n : {1, 5, 16, 44, 64, 67}) {
    const std::vector<float> a = random_row(kRows * (kDepth + kPadding), 1.0f, 1);
    const std::vector<float> b = random_row(static_cast<int>(kDepth * (n + kPadding)), 1.0f, 2);
    const std::vector<float> before = random_row(static_cast<int>(kRows * (n + kPadding)), 1.0f, 3);
    for (int64_t rows = 1; rows <= kRows; ++rows) {
      std::vector<float> c = before;
      const Product<float> p{.rows = rows,
                             .n = n,
                             .k = kDepth,
                             .lda = kDepth + kPadding,
                             .ldb = n + kPadding,
                             .ldc = n + kPadding,
                             .add = rows % 2 == 0,
                             .a = a.data(),
                             .b = b.data(),
                             .c = c.data()};
      kernels().multiply(p);
      for (int64_t i = 0; i < kRows * (n + kPadding); ++i) {
        const auto at = static_cast<size_t>(i);
        const int64_t row = i / (n + kPadding);
        const int64_t column = i % (n + kPadding);
        if (row < rows && column < n)
          ASSERT_NEAR(c[at], product_at(p, row, column, before[at]), 5e-5) << row << ' ' << column;
        else
          ASSERT_EQ(c[at], before[at]) << row << ' ' << column;
      }
    }
  }
}

TEST_P(RowKernelsTest, ProductsOfARowHaveTheSameBitsWhateverIsBesideIt) {
  constexpr int64_t kDepth = 333;
  const std::vector<float> a = random_row(13 * kDepth, 1.0f, 1);
  const std::vector<float> b = random_row(64 * kDepth, 1.0f, 2);
  const auto multiplied = [&](int64_t first, int64_t rows) {
    std::vector<float> c(static_cast<size_t>(rows) * 64);
    kernels().multiply({.rows = rows,
                        .n = 64,
                        .k = kDepth,
                        .lda = kDepth,
                        .ldb = 64,
                        .ldc = 64,
                        .add = false,
                        .a = a.data() + first * kDepth,
                        .b = b.data(),
                        .c = c.data()});
    return c;
  };
  const std::vector<float> all = multiplied(0, 13);
  for (int64_t rows = 1; rows <= 13; ++rows) {
    const std::vector<float> last = multiplied(13 - rows, rows);
    EXPECT_TRUE(std::equal(last.rbegin(), last.rend(), all.rbegin())) << rows;
  }
}

TEST(Bf16ProductTest, IsWithinFloatRoundingAndARowDependsOnNoOther) {
  const RowKernels<Bf16>& kernels = row_kernels<Bf16>();
  if (kernels.multiply == nullptr)
    GTEST_SKIP() << "no instruction for it";
  constexpr int64_t kRows = 32;  // several passes over the weights
  constexpr int64_t kDepth = 70;
  std::vector<Bf16> a;
  std::vector<Bf16> b;
  for (const float x : random_row(kRows * kDepth, 1.0f, 1))
    a.push_back(narrowed(x));
  for (const float x : random_row(kDepth * 80, 1.0f, 2))
    b.push_back(narrowed(x));
  for (const int64_t n : {16, 32, 64, 80}) {
    const std::vector<float> before = random_row(static_cast<int>(kRows * n), 1.0f, 3);
    const auto multiplied = [&](int64_t first, int64_t rows, bool add) {
      std::vector<float> c(before.begin() + first * n, before.begin() + (first + rows) * n);
      kernels.multiply({.rows = rows,
                        .n = n,
                        .k = kDepth,
                        .lda = kDepth,
                        .ldb = n,
                        .ldc = n,
                        .add = add,
                        .a = a.data() + first * kDepth,
                        .b = b.data(),
                        .c = c.data(),
                        .ahead = rows % 2 == 0 ? b.data() : nullptr});  // changes no bit
      return c;
    };
    for (const bool add : {false, true}) {
      const std::vector<float> all = multiplied(0, kRows, add);
      for (int64_t i = 0; i < kRows * n; ++i) {
        double sum = add ? before[static_cast<size_t>(i)] : 0.0;
        for (int64_t k = 0; k < kDepth; ++k) {
          const int64_t at = (k / 2 * n + i % n) * 2 + k % 2;
          sum += double{widened(a[static_cast<size_t>(i / n * kDepth + k)])} *
                 widened(b[static_cast<size_t>(at)]);
        }
        ASSERT_NEAR(all[static_cast<size_t>(i)], sum, 5e-5) << i / n << ' ' << i % n;
      }
      for (int64_t rows = 1; rows <= kRows; ++rows) {
        const std::vector<float> last = multiplied(kRows - rows, rows, add);
        EXPECT_TRUE(std::equal(last.rbegin(), last.rend(), all.rbegin())) << rows;
      }
    }
  }
}

// The softmax over some keys, in double but for its result.
class Softmax {
 public:
  static constexpr size_t kDim = 19;

  Softmax(const std::vector<float>& scores, const std::vector<float>& values, size_t begin,
          size_t end) {
    for (size_t key = begin; key < end; ++key)
      peak = std::max(peak, scores[key]);
    std::vector<double> total(kDim);
    double all = 0;
    for (size_t key = begin; key < end; ++key) {
      const double p = std::exp2(double{scores[key]} - peak);
      all += p;
      for (size_t i = 0; i < kDim; ++i)
        total[i] += p * values[key * kDim + i];
    }
    sum = static_cast<float>(all);
    output.assign(total.begin(), total.end());
  }
  PartialSoftmax get() { return {&peak, &sum, output.data(), 1, static_cast<int>(kDim)}; }

  float peak = -INFINITY;
  float sum = 0.0f;
  std::vector<float> output;
};

TEST_P(RowKernelsTest, MergedSoftmaxesAreThatOverAllKeys) {
  constexpr size_t kKeys = 40;
  const std::vector<float> scores = random_row(kKeys, 9.0f);
  const std::vector<float> values = random_row(static_cast<int>(kKeys * Softmax::kDim), 1.0f, 2);
  const Softmax wanted(scores, values, 0, kKeys);
  for (const size_t border : {size_t{0}, size_t{1}, size_t{17}, kKeys}) {  // of no keys at the ends
    Softmax all(scores, values, 0, border);
    Softmax further(scores, values, border, kKeys);
    kernels().merge(further.get(), 1, all.get());
    EXPECT_EQ(all.peak, wanted.peak);
    for (size_t i = 0; i < Softmax::kDim; ++i)
      EXPECT_NEAR(all.output[i] / all.sum, wanted.output[i] / wanted.sum, 2e-6) << border;
  }
}

TEST_P(RowKernelsTest, SoftmaxCapsWhatIsValidFirst) {
  const int cols = 45;
  const float cap = 3.0f;
  std::vector<float> scores = random_row(cols, 8.0f);
  const std::vector<float> given = scores;
  const int lo = 3;
  const int hi = 41;
  float peak = -INFINITY;
  float sum = 0.0f;
  std::vector<float> output(8, 0.0f);
  std::vector<float> probabilities(cols, -1.0f);
  kernels().softmax({.scores = scores.data(),
                     .ld = cols,
                     .rows = 1,
                     .cols = cols,
                     .valid_lo = &lo,
                     .valid_hi = &hi,
                     .row_max = &peak,
                     .row_sum = &sum,
                     .output = output.data(),
                     .dim = 8,
                     .softcap = cap},
                    probabilities.data());
  double total = 0;
  std::vector<double> wanted(cols, 0.0);
  for (int i = lo; i < hi; ++i) {
    wanted[static_cast<size_t>(i)] =
        std::exp2(reference::soft_capped(given[static_cast<size_t>(i)], cap));
    total += wanted[static_cast<size_t>(i)];
  }
  for (size_t i = 0; i < wanted.size(); ++i)
    EXPECT_NEAR(probabilities[i] / sum, wanted[i] / total, 1e-6);
}

// What has gone wrong must be seen in the logits, on every instruction set.
TEST_P(RowKernelsTest, NaNStaysNaN) {
  constexpr int kCols = 45;
  const std::vector<float> given = random_row(kCols, 1.0f);
  for (const size_t at : {size_t{0}, size_t{20}, size_t{44}}) {  // in a vector, and behind the last
    std::vector<float> row = given;
    row[at] = std::nanf("");
    std::vector<float> out = row;
    kernels().soft_cap(out.data(), kCols, 3.0f);
    EXPECT_TRUE(std::isnan(out[at])) << at;
    PromptScore kept;
    kernels().score(row.data(), kCols, 1, kept);
    EXPECT_TRUE(std::isnan(kept.log_sum_exp)) << at;
    const int lo = 0;
    float peak = -INFINITY;
    float sum = 0.0f;
    float output = 0.0f;
    kernels().softmax({.scores = row.data(),
                       .ld = kCols,
                       .rows = 1,
                       .cols = kCols,
                       .valid_lo = &lo,
                       .valid_hi = &kCols,
                       .row_max = &peak,
                       .row_sum = &sum,
                       .output = &output,
                       .dim = 1,
                       .softcap = 0.0f},
                      out.data());
    EXPECT_TRUE(std::isnan(out[at])) << at;
    EXPECT_TRUE(std::isnan(sum)) << at;
  }
}

TEST_P(RowKernelsTest, RopeTurnsTheFirstDimensionsAndLeavesTheOthers) {
  const int dim = 22;
  const int turning = 8;
  const std::vector<float> in = random_row(dim, 1.0f);
  const std::vector<float> angles = random_row(turning / 2, 2.0f, 2);
  std::vector<float> cos;
  std::vector<float> sin;
  for (const float angle : angles) {
    cos.push_back(std::cos(angle));
    sin.push_back(std::sin(angle));
  }
  std::vector<double> wanted(in.begin(), in.begin() + turning);
  reference::rotate(wanted, cos, sin);
  std::vector<float> out(in.size());
  const RopeHead head{.bias = nullptr,
                      .norm_weight = nullptr,
                      .norm_eps = 0.0f,
                      .inverse_rms = 0.0f,
                      .scale = 0.5f,
                      .dim = dim,
                      .turning = turning};
  kernels().rope(in.data(), head, cos.data(), sin.data(), out.data());
  for (size_t i = 0; i < turning; ++i)
    EXPECT_NEAR(out[i], 0.5 * wanted[i], 1e-6);
  for (size_t i = turning; i < in.size(); ++i)
    EXPECT_EQ(out[i], 0.5f * in[i]);
}

TEST_P(RowKernelsTest, RopeTakesTheInverseRmsOfItsRowOrMakesThatOfTheHead) {
  const int dim = 12;
  const std::vector<float> in = random_row(dim, 1.0f);
  const std::vector<float> weight = random_row(dim, 1.0f, 3);
  const std::vector<float> one(6, 1.0f);
  const std::vector<float> zero(6, 0.0f);
  std::vector<float> out(in.size());
  RopeHead head{.bias = nullptr,
                .norm_weight = weight.data(),
                .norm_eps = 1e-5f,
                .inverse_rms = 0.25f,
                .scale = 1.0f,
                .dim = dim,
                .turning = dim};
  kernels().rope(in.data(), head, one.data(), zero.data(), out.data());
  for (size_t i = 0; i < in.size(); ++i)
    EXPECT_NEAR(out[i], 0.25f * in[i] * weight[i], 1e-6f);
  head.inverse_rms = 0.0f;
  kernels().rope(in.data(), head, one.data(), zero.data(), out.data());
  for (size_t i = 0; i < in.size(); ++i)
    EXPECT_NEAR(out[i], reference::inverse_rms(in, 1e-5) * in[i] * weight[i], 2e-6f);
}

TEST_P(RowKernelsTest, AddScaledAddsWithAndWithoutANorm) {
  const int n = 133;
  const std::vector<float> x = random_row(n, 3.0f);
  const std::vector<float> weight = random_row(n, 1.0f, 4);
  const std::vector<float> before = random_row(n, 1.0f, 5);
  std::vector<float> out = before;
  kernels().add_scaled(x.data(), nullptr, n, 1e-5f, 0.22f, out.data());
  for (size_t i = 0; i < x.size(); ++i)
    EXPECT_NEAR(out[i], before[i] + 0.22f * x[i], 1e-6f);
  out = before;
  kernels().add_scaled(x.data(), weight.data(), n, 1e-5f, 0.22f, out.data());
  for (size_t i = 0; i < x.size(); ++i)
    EXPECT_NEAR(out[i], before[i] + 0.22 * reference::inverse_rms(x, 1e-5) * x[i] * weight[i],
                2e-6);
}

TEST_P(RowKernelsTest, InverseRmsIsThatOfTheSumWithTheBias) {
  const std::vector<float> x = random_row(77, 1.0f);
  const std::vector<float> bias = random_row(77, 1.0f, 6);
  std::vector<float> sum = x;
  for (size_t i = 0; i < sum.size(); ++i)
    sum[i] += bias[i];
  EXPECT_NEAR(kernels().inverse_rms(x.data(), nullptr, 77, 1e-5f), reference::inverse_rms(x, 1e-5),
              1e-6);
  EXPECT_NEAR(kernels().inverse_rms(x.data(), bias.data(), 77, 1e-5f),
              reference::inverse_rms(sum, 1e-5), 1e-6);
}

// The Hadamard matrix over 8, element by element.
double rotated(const std::vector<float>& row, size_t i) {
  double sum = 0;
  for (size_t j = i - i % kRotatedRun; j < i - i % kRotatedRun + kRotatedRun; ++j) {
    const size_t both = (i % kRotatedRun) & (j % kRotatedRun);
    const double x = j < row.size() ? row[j] : 0.0f;
    sum += std::popcount(both) % 2 == 0 ? x : -x;
  }
  return sum / 8;
}

TEST_P(RowKernelsTest, RotateIsTheHadamardProductOfRunsFilledWithZeros) {
  for (const int n : {1, 16, 64, 100, 192}) {
    const std::vector<float> row = random_row(n, 2.0f);
    const size_t padded = static_cast<size_t>(n + kRotatedRun - 1) / kRotatedRun * kRotatedRun;
    std::vector<float> out(padded, -1.0f);
    const float largest = kernels().rotate(row.data(), n, out.data());
    double most = 0;
    for (size_t i = 0; i < padded; ++i) {
      EXPECT_NEAR(out[i], rotated(row, i), 1e-5) << n << ", " << i;
      most = std::max(most, std::abs(rotated(row, i)));
    }
    EXPECT_NEAR(largest, most, 1e-5);
  }
}

TEST_P(RowKernelsTest, RotateTellsNaN) {
  std::vector<float> row = random_row(130, 1.0f);
  row[70] = std::nanf("");
  std::vector<float> out(192);
  EXPECT_TRUE(std::isnan(kernels().rotate(row.data(), 130, out.data())));
}

TEST_P(RowKernelsTest, BytesAreRoundedToNearestAroundTheirZero) {
  std::vector<float> row = random_row(77, 20.0f);
  row[0] = 254.0f;
  row[1] = -254.0f;
  row[2] = 5.0f;  // halves go to the even one
  row[3] = 7.0f;
  std::vector<uint8_t> out(row.size());
  kernels().round_to_bytes(row.data(), 77, 0.5f, out.data());
  EXPECT_EQ(out[0], 255);
  EXPECT_EQ(out[1], 1);
  EXPECT_EQ(out[2], 130);
  EXPECT_EQ(out[3], 132);
  for (size_t i = 0; i < row.size(); ++i)
    EXPECT_EQ(out[i], std::nearbyint(row[i] * 0.5f) + kByteZero) << i;
}

TEST_P(RowKernelsTest, SumsOfBytesAreScaledByRowAndColumn) {
  const std::vector<int32_t> product{5, -7, 1'000'000'000, 0, 9, 128};
  const std::vector<float> column_scales{0.5f, 2.0f, 0.25f};
  const std::vector<int32_t> shifts{1, -1, 128};
  const std::vector<float> row_scales{3.0f, -9.0f, 0.5f, -9.0f};  // two floats apart
  std::vector<float> c(8, 1.0f);
  const ByteProduct of{.product = product.data(),
                       .columns = 3,
                       .column_scales = column_scales.data(),
                       .column_shifts = shifts.data(),
                       .row_scales = reinterpret_cast<const uint8_t*>(row_scales.data()),
                       .row_stride = 8};
  kernels().scale_product(of, 2, c.data(), 4, false);
  EXPECT_EQ(c, (std::vector<float>{6.0f, -36.0f, 750'000'000.0f - 96.0f, 1.0f, -0.25f, 10.0f, 0.0f,
                                   1.0f}));
  kernels().scale_product(of, 2, c.data(), 4, true);
  EXPECT_EQ(c[0], 12.0f);
  EXPECT_EQ(c[5], 20.0f);
  EXPECT_EQ(c[7], 1.0f);
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, RowKernelsTest, testing::ValuesIn(levels()),
                         [](const auto& isa) { return std::string(isa.param.name); });

}  // namespace
}  // namespace flowprefill
