// Cases of sampling that hold wherever it is done: against a sampler written with sorts and doubles
// after flowprefill/engine/sampler.py, and the exact ones: ties, rows without an answer. Each
// device's test includes this file once and instantiates Sample with its implementations.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "graph/sampling_params.h"
#include "reference.h"

namespace flowprefill {
namespace sample_suite {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Implementation {
  std::string name;
  // A token for each row of logits, [rows, logits.size() / rows]; -1: none to choose. seed: of the
  // order of what runs at once.
  std::vector<int32_t> (*sample)(const std::vector<float>& logits,
                                 const std::vector<SamplingParams>& params, uint32_t seed);
};

// Every token that a rounding of the weights by `error` could lead to.
std::set<int32_t> allowed(const float* logits, int32_t width, const SamplingParams& params,
                          double error) {
  const std::span row(logits, static_cast<size_t>(width));
  std::set<int32_t> out;
  for (const double p : {params.top_p - error, params.top_p + 0.0, params.top_p + error}) {
    for (const double u : {params.uniform - error, params.uniform + 0.0, params.uniform + error})
      out.insert(reference::sampled(row, params, p, u));
  }
  return out;
}

class Sample : public testing::TestWithParam<Implementation> {
 protected:
  std::mt19937 engine{1};

  std::vector<int32_t> sample(const std::vector<float>& logits,
                              const std::vector<SamplingParams>& params, uint32_t seed = 1) const {
    return GetParam().sample(logits, params, seed);
  }
  int32_t integer(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(engine);
  }
  float real(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(engine);
  }

  std::vector<float> normal_row(int32_t width, uint32_t seed) {
    engine.seed(seed);
    std::normal_distribution<float> normal(0, 3);
    std::vector<float> values(static_cast<size_t>(width));
    for (float& value : values)
      value = normal(engine);
    return values;
  }
  bool coin() { return integer(0, 1) == 1; }
  // Wide rows; with few distinct values: many ties.
  std::vector<float> logits(int32_t count) {
    const float grid = coin() ? 0.5f : 0.0f;
    std::normal_distribution<float> normal(real(-20, 20), real(0.5f, 6));
    std::vector<float> out(static_cast<size_t>(count));
    for (float& value : out) {
      value = grid > 0 ? std::round(normal(engine) / grid) * grid : normal(engine);
      if (integer(0, 9) == 0)
        value = -kInfinity;
    }
    return out;
  }
  SamplingParams params(int32_t width) {
    return {.temperature = coin() ? 1.0f : real(0.2f, 3),
            .top_k = coin() ? 0 : integer(1, width + 3),
            .top_p = coin() ? 1.0f : real(0.02f, 1),
            .min_p = coin() ? 0.0f : real(0, 0.4f),
            .uniform = real(0, 1)};
  }

  void compare_with_sorting(uint32_t seed) {
    const int32_t rows = 5;
    const int32_t width = integer(1, 900);
    std::vector<float> values = logits(rows * width);
    for (int32_t row = 0; row < rows; ++row)  // at least one token is left
      values[static_cast<size_t>(row * width + integer(0, width - 1))] = real(-1, 1);
    std::vector<SamplingParams> of_rows;
    for (int32_t row = 0; row < rows; ++row)
      of_rows.push_back(params(width));
    const std::vector<int32_t> got = sample(values, of_rows, seed);
    int exact = 0;
    for (int32_t row = 0; row < rows; ++row) {
      const float* of_row = values.data() + int64_t{row} * width;
      const SamplingParams& p = of_rows[static_cast<size_t>(row)];
      const int32_t token = got[static_cast<size_t>(row)];
      EXPECT_TRUE(allowed(of_row, width, p, 2e-6).contains(token))
          << "row " << row << ": " << token << " of " << width << ", temperature " << p.temperature
          << ", top_k " << p.top_k << ", top_p " << p.top_p << ", min_p " << p.min_p << ", uniform "
          << p.uniform;
      const std::span logits_of_row(of_row, static_cast<size_t>(width));
      exact += reference::sampled(logits_of_row, p, p.top_p, p.uniform) == token ? 1 : 0;
    }
    EXPECT_GE(exact, rows - 1);  // near a threshold is rare
  }

  void check_greedy(uint32_t seed) {
    const int32_t width = integer(1, 500);
    std::vector<float> values(static_cast<size_t>(width));
    for (float& value : values)
      value = static_cast<float>(integer(-2, 2));
    const auto want =
        static_cast<int32_t>(std::max_element(values.begin(), values.end()) - values.begin());
    for (SamplingParams p : {SamplingParams{.temperature = 0, .uniform = 0.7f},
                             SamplingParams{.temperature = 9e-6f, .uniform = 0.7f},
                             SamplingParams{.temperature = 1, .top_k = 1, .uniform = 0.99f},
                             SamplingParams{.temperature = 2, .top_p = 1e-6f, .uniform = 0.99f}}) {
      EXPECT_EQ(sample(values, {p}, seed), std::vector{want});
    }
  }
};

TEST_P(Sample, GivesTheTokenOfTheSortingSampler) {
  for (uint32_t seed = 1; seed <= 12; ++seed) {
    engine.seed(seed);
    compare_with_sorting(seed);
  }
}

TEST_P(Sample, GreedyIsTheFirstOfTheLargest) {
  for (uint32_t seed = 1; seed <= 12; ++seed) {
    engine.seed(seed);
    check_greedy(seed);
  }
}

TEST_P(Sample, ARowOf50257) {
  const int32_t width = 50257;
  const std::vector<float> values = normal_row(width, 11);
  for (const int32_t top_k : {0, 400}) {
    const SamplingParams p = {
        .temperature = 0.8f, .top_k = top_k, .top_p = 0.95f, .uniform = 0.618f};
    const int32_t token = sample(values, {p}).front();
    EXPECT_TRUE(allowed(values.data(), width, p, 5e-6).contains(token)) << token;
  }
}

// No width that a device might like; from narrow distributions to nearly even ones, in which one
// threshold has thousands of near neighbours.
TEST_P(Sample, ARowOf200003) {
  const int32_t width = 200003;
  const std::vector<float> values = normal_row(width, 12);
  for (const SamplingParams p :
       {SamplingParams{.temperature = 0.5f, .top_p = 0.9f, .uniform = 0.618f},
        SamplingParams{.temperature = 1, .top_k = 3000, .uniform = 0.7f},
        SamplingParams{
            .temperature = 1, .top_k = 50, .top_p = 0.9f, .min_p = 0.2f, .uniform = 0.5f},
        SamplingParams{.temperature = 1, .uniform = 0.4f},
        SamplingParams{.temperature = 1000, .top_p = 0.7f, .uniform = 0.3f}}) {
    const int32_t token = sample(values, {p}).front();
    EXPECT_TRUE(allowed(values.data(), width, p, 5e-6).contains(token))
        << token << ", temperature " << p.temperature << ", top_k " << p.top_k;
  }
}

// Every token of the distribution once, by its share of the uniform numbers.
TEST_P(Sample, UniformNumbersArePartedAsTheWeightsAre) {
  const std::vector<float> row = {std::log(1.0f), std::log(4.0f), -kInfinity, std::log(2.0f),
                                  std::log(1.0f)};
  std::vector<float> logits;
  std::vector<SamplingParams> params;
  for (int i = 0; i < 16; ++i) {
    logits.insert(logits.end(), row.begin(), row.end());
    params.push_back({.temperature = 1, .uniform = (static_cast<float>(i) + 0.5f) / 16});
  }
  EXPECT_EQ(sample(logits, params), (std::vector{0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 4, 4}));
}

TEST_P(Sample, OfEqualTokensTheFirstStay) {
  const std::vector<float> row = {1, 2, 1, 2, 1, 2, 1, 1};
  const auto last = [&, this](SamplingParams p) {
    p.temperature = 1;
    p.uniform = 0.999999f;
    return sample(row, {p}).front();
  };
  EXPECT_EQ(last({.top_k = 2}), 3);
  EXPECT_EQ(last({.top_k = 3}), 5);
  EXPECT_EQ(last({.top_k = 5}), 5);  // 1, 3, 5 and of the others 0 and 2
  const auto first = [&, this](SamplingParams p) {
    p.temperature = 1;
    return sample(row, {p}).front();
  };
  EXPECT_EQ(first({.top_k = 3}), 1);
  EXPECT_EQ(first({.top_k = 4}), 0);
  // Weights e e e 1 1 1 1 1, 13.15 in all: the three take 62 %, each other 7.6 %.
  EXPECT_EQ(last({.top_p = 0.2f}), 1);
  EXPECT_EQ(last({.top_p = 0.6f}), 5);
  EXPECT_EQ(first({.top_p = 0.6f}), 1);
  EXPECT_EQ(first({.top_p = 0.65f}), 0);
  EXPECT_EQ(last({.top_p = 0.92f}), 6);
  EXPECT_EQ(last({.top_k = 4, .top_p = 0.99f}), 5);  // top_k leaves 0, top_p keeps it
  EXPECT_EQ(first({.top_k = 4, .top_p = 0.99f}), 0);
  EXPECT_EQ(first({.top_p = 0.99f, .min_p = 0.5f}), 1);  // min_p comes first
}

// More equal ones than any list of candidates may have room for.
TEST_P(Sample, OfManyEqualTokensTheFirstStay) {
  const int32_t width = 3001;
  const std::vector<float> alike(width, 0.25f);
  const auto of_alike = [&, this](SamplingParams p) {
    p.temperature = 0.7f;
    return sample(alike, {p}).front();
  };
  EXPECT_EQ(of_alike({.top_k = 4, .uniform = 0.6f}), 2);
  EXPECT_EQ(of_alike({.uniform = 0.5f}), 1500);
  EXPECT_EQ(of_alike({.top_k = width, .uniform = 0.5f}), 1500);
  EXPECT_EQ(of_alike({.top_k = width - 1, .uniform = 1.0f}), width - 2);
  EXPECT_EQ(of_alike({.top_p = 0.5f, .uniform = 0.999f}), 1499);  // of 1501
  EXPECT_EQ(of_alike({.top_k = 2000, .top_p = 0.5f, .uniform = 1.0f}), 999);
  EXPECT_EQ(of_alike({.top_p = 1e-6f, .uniform = 1.0f}), 0);
  EXPECT_EQ(of_alike({.min_p = 1, .uniform = 1.0f}), width - 1);

  std::vector<float> some_ahead(5000, 1.0f);
  std::fill_n(some_ahead.begin(), 5, 2.0f);
  const auto last = [&, this](SamplingParams p) {
    p.temperature = 1;
    p.uniform = 0.99999f;
    return sample(some_ahead, {p}).front();
  };
  EXPECT_EQ(last({.top_k = 1005}), 1004);
  EXPECT_EQ(last({.top_p = 0.5f}), 2495);  // 13.6 of five, 2491 of the others: half of 5008.6
  EXPECT_EQ(last({.top_k = 1005, .top_p = 0.5f}), 498);  // 13.6 and 494, half of 1013.6
  EXPECT_EQ(last({.top_p = 0.5f, .min_p = 0.5f}), 2);
}

TEST_P(Sample, TopKOfTheWholeRowLeavesAll) {
  engine.seed(6);
  const int32_t width = 1203;
  std::vector<float> row(static_cast<size_t>(width));
  for (float& value : row)
    value = real(-3, 3);
  for (const float uniform : {0.0f, 0.3f, 0.999f}) {
    const auto with = [&, this](int32_t top_k) {
      return sample(row, {{.temperature = 1, .top_k = top_k, .uniform = uniform}}).front();
    };
    EXPECT_EQ(with(width), with(0));
    EXPECT_EQ(with(width + 1), with(0));
  }
}

TEST_P(Sample, TheSmallestNumbersAreInOrder) {
  const std::vector<float> row = {1e-40f, -0.0f, 0.0f, -1e-40f};  // as likely as each other
  for (int32_t top_k = 1; top_k <= 4; ++top_k) {
    EXPECT_EQ(sample(row, {{.temperature = 1, .top_k = top_k, .uniform = 0.99f}}),
              std::vector{top_k - 1});
  }
}

TEST_P(Sample, ZeroAndMinusZeroAreEqual) {
  EXPECT_EQ(sample({-0.0f, 0.0f, -1.0f}, {{.temperature = 1, .top_k = 1, .uniform = 0.9f}}),
            std::vector{0});
}

TEST_P(Sample, RowsWithoutAnAnswerAreMarked) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> logits = {
      -kInfinity, -kInfinity, -kInfinity,  // nothing left
      1,          nan,        2,           // NaN
      1,          kInfinity,  2,           // infinite
      -kInfinity, -3e38f,     -kInfinity,  // one left
  };
  for (const float temperature : {0.0f, 1.0f}) {
    const std::vector<SamplingParams> params(
        4, {.temperature = temperature, .top_k = 2, .top_p = 0.5f, .min_p = 0.1f, .uniform = 0.5f});
    EXPECT_EQ(sample(logits, params, 3), (std::vector{-1, -1, -1, 1}));
  }
}

TEST_P(Sample, UniformOfOneAndHugeRangesStayInside) {
  const std::vector<float> row = {0, 3e38f, -3e38f, 3e38f, -kInfinity};
  for (const float uniform : {0.0f, 0.4f, 0.6f, 1.0f}) {
    const int32_t want = uniform < 0.5f ? 1 : 3;
    EXPECT_EQ(sample(row, {{.temperature = 1e-5f, .top_p = 0.99f, .uniform = uniform}}),
              std::vector{want});
  }
}

// A row's token does not depend on the other rows, nor on the order in which threads run.
TEST_P(Sample, ARowIsTheSameInAnyCompany) {
  engine.seed(5);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(4 * 700);
  for (float& value : logits)
    value = normal(engine);
  std::vector<SamplingParams> params;
  for (int i = 0; i < 4; ++i)
    params.push_back({.temperature = 1.5f, .top_k = 300 * i, .top_p = 0.9f, .uniform = 0.2f * i});
  const std::vector<int32_t> together = sample(logits, params, 1);
  EXPECT_EQ(sample(logits, params, 2), together);
  for (size_t i = 0; i < 4; ++i) {
    const auto begin = logits.begin() + static_cast<ptrdiff_t>(i) * 700;
    EXPECT_EQ(sample({begin, begin + 700}, {params[i]}, 3), std::vector{together[i]});
  }
}

inline std::string name_of(const testing::TestParamInfo<Implementation>& info) {
  return info.param.name;
}

}  // namespace sample_suite
}  // namespace flowprefill
