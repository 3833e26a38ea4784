// route_row(): the experts of the largest logits and their weights, with ties and NaN.
#include "devices/cpu/route.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

namespace flowprefill {
namespace {

std::vector<float> routed(const std::vector<float>& logits, int32_t slots, bool sums_to_one) {
  std::vector<float> out(2 * static_cast<size_t>(slots));
  route_row(logits.data(), static_cast<int32_t>(logits.size()), slots, sums_to_one, out.data());
  return out;
}

TEST(RouteTest, IsTheSoftmaxOfTheLargestLogits) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  for (const size_t experts : {1, 2, 8, 60, 128}) {
    for (const bool sums_to_one : {false, true}) {
      std::vector<float> logits(experts);
      std::ranges::generate(logits, [&] { return normal(random); });
      const size_t slots = std::min<size_t>(experts, 8);
      const std::vector<float> out = routed(logits, static_cast<int32_t>(slots), sums_to_one);
      std::vector<size_t> order(experts);
      std::iota(order.begin(), order.end(), size_t{0});
      std::ranges::sort(order, [&](size_t a, size_t b) { return logits[a] > logits[b]; });
      double sum = 0;
      for (size_t i = 0; i < (sums_to_one ? slots : experts); ++i)
        sum += std::exp(static_cast<double>(logits[order[i]]));
      for (size_t i = 0; i < slots; ++i) {
        EXPECT_EQ(out[i], static_cast<float>(order[i]));
        EXPECT_NEAR(out[slots + i], std::exp(static_cast<double>(logits[order[i]])) / sum, 1e-6);
      }
    }
  }
}

TEST(RouteTest, OfEqualLogitsTheLowerExpertComesFirst) {
  const std::vector<float> out = routed({1, 2, 2, 0, 2}, 4, true);
  EXPECT_EQ(std::vector(out.begin(), out.begin() + 4), (std::vector<float>{1, 2, 4, 0}));
}

TEST(RouteTest, LargeLogitsDoNotOverflow) {
  const std::vector<float> out = routed({-1e30f, 1e30f, 1e30f}, 2, false);
  EXPECT_EQ(out, (std::vector<float>{1, 2, 0.5f, 0.5f}));
}

TEST(RouteTest, NanMakesWeightsNanAndExpertsStayDifferent) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const std::vector<float>& logits :
       {std::vector<float>{nan, nan, nan}, {0, nan, 1}, {nan, 1, 0}}) {
    for (const bool sums_to_one : {false, true}) {
      const std::vector<float> out = routed(logits, 2, sums_to_one);
      EXPECT_TRUE(std::isnan(out[2]) && std::isnan(out[3])) << sums_to_one;
      EXPECT_EQ(std::set<float>(out.begin(), out.begin() + 2).size(), 2u);
      EXPECT_TRUE(std::ranges::all_of(out.begin(), out.begin() + 2,
                                      [](float e) { return e >= 0 && e < 3; }));
    }
  }
}

}  // namespace
}  // namespace flowprefill
