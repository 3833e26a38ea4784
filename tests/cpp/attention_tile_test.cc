// Tests of the one-pass attention of csrc/devices/cpu/isa_attention.h and isa_attention_amx.h
// against a plain softmax in double precision: head sizes, blocks, masks, windows, caps, and bits
// that no neighbour changes.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <tuple>
#include <vector>

#include "bf16.h"
#include "devices/cpu/isa.h"
#include "devices/cpu/row_kernels.h"
#include "plain_tiles.h"

namespace flowprefill {
namespace {

enum class By { kRegisters, kPlainTiles, kTiles };

struct Sizes {
  int dim;
  int tokens;  // of a block
  int window;  // 0: none
  float softcap;
};

// Rows at the last positions of a sequence of whole blocks but for `missing` tokens.
class Problem {
 public:
  Problem(By by, const Sizes& sizes, int rows, int blocks, int missing, float spread = 1.0f)
      : by_(by), s_(sizes), rows_(rows), blocks_(blocks), keys_(blocks * sizes.tokens - missing) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal(0.0f, 1.0f);
    const auto fill = [&](std::vector<Bf16>& values, int64_t n, float deviation) {
      for (int64_t i = 0; i < n; ++i)
        values.push_back(narrowed(normal(random) * deviation));
    };
    fill(q_, int64_t{rows + kRoom} * s_.dim, spread);
    fill(keys_of_, int64_t{blocks} * s_.tokens * s_.dim, 0.7f);
    fill(values_of_, int64_t{blocks} * s_.tokens * s_.dim, 1.0f);
  }

  int lo(int row) const { return s_.window > 0 ? hi(row) - s_.window : 0; }
  int hi(int row) const { return keys_ - rows_ + row + 1; }

  // Rows [begin, end) by the kernel: [rows, dim], divided by their sums.
  std::vector<float> attended(int begin, int end) const {
    const int rows = end - begin;
    const auto n = static_cast<size_t>(rows + kRoom);
    std::vector<float> row_max(n, kNoMaximum);
    std::vector<float> row_sum(n * kSumLanes, 0.0f);
    std::vector<float> output(n * static_cast<size_t>(s_.dim), 0.0f);
    std::vector<int> valid_lo(n);
    std::vector<int> valid_hi(n);
    const auto attend = by_ == By::kRegisters    ? row_kernels<Bf16>().attend
                        : by_ == By::kPlainTiles ? attend_by_plain_tiles
                                                 : row_kernels<Bf16>().attend_by_tiles;
    for (int block = 0; block < blocks_; ++block) {
      bool sees_all = true;
      for (int r = 0; r < rows; ++r) {
        valid_lo[static_cast<size_t>(r)] = lo(begin + r) - block * s_.tokens;
        valid_hi[static_cast<size_t>(r)] = hi(begin + r) - block * s_.tokens;
        sees_all = sees_all && valid_lo[static_cast<size_t>(r)] <= 0 &&
                   valid_hi[static_cast<size_t>(r)] >= s_.tokens;
      }
      const int64_t at = int64_t{block} * s_.tokens * s_.dim;
      attend({.q = q_.data() + int64_t{begin} * s_.dim,
              .keys = keys_of_.data() + at,
              .values = values_of_.data() + at,
              .rows = rows,
              .dim = s_.dim,
              .tokens = s_.tokens,
              .sees_all = sees_all,
              .valid_lo = valid_lo.data(),
              .valid_hi = valid_hi.data(),
              .row_max = row_max.data(),
              .row_sum = row_sum.data(),
              .output = output.data(),
              .softcap = s_.softcap,
              .ahead = begin % 2 == 0 ? keys_of_.data() : nullptr});
    }
    output.resize(static_cast<size_t>(rows) * static_cast<size_t>(s_.dim));
    for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
      float sum = 0.0f;
      for (size_t lane = 0; lane < kSumLanes; ++lane)
        sum += row_sum[r * kSumLanes + lane];
      for (int d = 0; d < s_.dim; ++d)
        output[r * static_cast<size_t>(s_.dim) + static_cast<size_t>(d)] /= sum;
    }
    return output;
  }

  // One row, written out.
  std::vector<double> expected(int row) const {
    std::vector<double> scores;
    double peak = -1e300;
    for (int key = std::max(lo(row), 0); key < hi(row); ++key) {
      double score = 0;
      for (int d = 0; d < s_.dim; ++d)
        score += static_cast<double>(widened(q_[static_cast<size_t>(row * s_.dim + d)])) *
                 static_cast<double>(this->key(key, d));
      if (s_.softcap > 0)
        score =
            static_cast<double>(s_.softcap) * std::tanh(score / static_cast<double>(s_.softcap));
      scores.push_back(score);
      peak = std::max(peak, score);
    }
    std::vector<double> mixed(static_cast<size_t>(s_.dim), 0.0);
    double sum = 0;
    for (size_t i = 0; i < scores.size(); ++i) {
      const double p = std::exp2(scores[i] - peak);
      sum += p;
      for (int d = 0; d < s_.dim; ++d) {
        mixed[static_cast<size_t>(d)] +=
            p * static_cast<double>(value(std::max(lo(row), 0) + static_cast<int>(i), d));
      }
    }
    for (double& x : mixed)
      x /= sum;
    return mixed;
  }

 private:
  static constexpr int kRoom = 15;  // rows that fill up sixteens

  // Layouts: kv_cache.h.
  float key(int token, int d) const {
    const int64_t block = int64_t{token / s_.tokens} * s_.tokens * s_.dim;
    const int t = token % s_.tokens;
    return widened(keys_of_[static_cast<size_t>(block + (d / 2 * s_.tokens + t) * 2 + d % 2)]);
  }
  float value(int token, int d) const {
    const int64_t block = int64_t{token / s_.tokens} * s_.tokens * s_.dim;
    const int t = token % s_.tokens;
    return widened(values_of_[static_cast<size_t>(block + (t / 2 * s_.dim + d) * 2 + t % 2)]);
  }

  By by_;
  Sizes s_;
  int rows_;
  int blocks_;
  int keys_;
  std::vector<Bf16> q_;
  std::vector<Bf16> keys_of_;
  std::vector<Bf16> values_of_;
};

class AttentionTileTest : public testing::TestWithParam<std::tuple<By, Sizes>> {
 protected:
  void SetUp() override {
    if (row_kernels<Bf16>().attend == nullptr)
      GTEST_SKIP() << "this processor has no AVX-512 BF16";
    if (by() == By::kPlainTiles && !can_attend_by_plain_tiles())
      GTEST_SKIP() << "this processor has no AVX-512 VBMI";
    if (by() == By::kTiles && isa() != Isa::kAmx)
      GTEST_SKIP() << "it has no tiles, or this process may not use them";
    if (by() != By::kRegisters && (sizes().dim % 32 != 0 || sizes().tokens % 32 != 0))
      GTEST_SKIP() << "these are no whole tiles";
  }
  static By by() { return std::get<By>(GetParam()); }
  static const Sizes& sizes() { return std::get<Sizes>(GetParam()); }
};

TEST_P(AttentionTileTest, IsTheSoftmaxOfTheKeysEachRowSees) {
  for (const auto [rows, blocks, missing] :
       {std::array{1, 1, 3}, std::array{5, 1, 0}, std::array{13, 3, 7}, std::array{40, 4, 1}}) {
    if (rows > sizes().tokens * blocks - missing)
      continue;
    const Problem problem(by(), sizes(), rows, blocks, missing);
    const std::vector<float> got = problem.attended(0, rows);
    for (int row = 0; row < rows; ++row) {
      const std::vector<double> want = problem.expected(row);
      for (size_t d = 0; d < want.size(); ++d) {
        ASSERT_NEAR(got[static_cast<size_t>(row) * want.size() + d], want[d], 2e-2)
            << rows << " rows, row " << row << ", column " << d;
      }
    }
  }
}

// Maxima that move in most steps, and scores so far apart that no word of 16 bits holds them.
TEST_P(AttentionTileTest, ScoresMayLieFarApart) {
  constexpr int kRows = 33;
  for (const float spread : {10.0f, 1e3f, 3e4f}) {
    const Problem problem(by(), sizes(), kRows, 4, 1, spread);
    if (kRows > sizes().tokens * 4 - 1)
      continue;
    const std::vector<float> got = problem.attended(0, kRows);
    for (int row = 0; row < kRows; ++row) {
      const std::vector<double> want = problem.expected(row);
      for (size_t d = 0; d < want.size(); ++d)
        ASSERT_NEAR(got[static_cast<size_t>(row) * want.size() + d], want[d], 6e-2)
            << "row " << row << ", column " << d << ", scores by " << spread;
    }
  }
}

TEST_P(AttentionTileTest, ARowHasTheSameBitsWhateverTheOtherRows) {
  constexpr int kRows = 39;
  const Problem problem(by(), sizes(), kRows, 3, 2);
  const std::vector<float> together = problem.attended(0, kRows);
  const auto dim = static_cast<size_t>(sizes().dim);
  for (int begin = 0; begin < kRows; begin += 4) {
    const int end = std::min(begin + 4, kRows);
    const std::vector<float> apart = problem.attended(begin, end);
    for (size_t i = 0; i < apart.size(); ++i)
      ASSERT_EQ(apart[i], together[static_cast<size_t>(begin) * dim + i]);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Sizes, AttentionTileTest,
    testing::Combine(testing::Values(By::kRegisters, By::kPlainTiles, By::kTiles),
                     testing::Values(Sizes{64, 64, 0, 0.0f}, Sizes{64, 128, 0, 0.0f},
                                     Sizes{128, 64, 0, 0.0f}, Sizes{96, 32, 0, 0.0f},
                                     Sizes{16, 16, 0, 0.0f}, Sizes{80, 128, 0, 0.0f},
                                     Sizes{256, 64, 0, 5.0f}, Sizes{64, 64, 20, 0.0f},
                                     Sizes{64, 128, 70, 3.0f})));

}  // namespace
}  // namespace flowprefill
