// The bodies that keep something of all rows of a prompt, against ATen: log-sum-exp, ranks and the
// largest logits; means of packed sequences, added up step by step.
#include "devices/cuda/kernels/score_body.h"

#include <ATen/ops/logsumexp.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/sort.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "simt.h"
#include "tensors.h"

namespace flowprefill {
namespace {

using simt::Thread;

constexpr int32_t kThreads = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Rows of sequences packed one after another, and padding.
struct Packed {
  std::vector<int32_t> tokens;
  std::vector<int32_t> sequences;
  std::vector<int32_t> last_rows;

  Packed(const std::vector<int32_t>& lengths, int32_t padding, int32_t vocab, Random& random) {
    for (size_t i = 0; i < lengths.size(); ++i) {
      sequences.insert(sequences.end(), static_cast<size_t>(lengths[i]),
                       static_cast<int32_t>(i) + 1);
      last_rows.push_back(static_cast<int32_t>(sequences.size()) - 1);
    }
    for (size_t i = 0; i < sequences.size(); ++i)
      tokens.push_back(random.integer(0, vocab - 1));
    sequences.resize(sequences.size() + static_cast<size_t>(padding), 0);
    tokens.resize(sequences.size(), 0);
  }
  int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
  BatchView from(int32_t row) const {
    return {.tokens = tokens.data() + row, .sequences = sequences.data() + row};
  }
};

std::vector<PromptScore> scores(const at::Tensor& logits, int32_t width, const Packed& packed,
                                const std::vector<int32_t>& next_tokens, int32_t step,
                                uint32_t seed) {
  std::vector<PromptScore> out(static_cast<size_t>(packed.rows()));
  for (int32_t row = 0; row < packed.rows(); row += step) {
    const int32_t rows = std::min(step, packed.rows() - row);
    const ScoreArgs args{.batch = packed.from(row),
                         .next_tokens = next_tokens.data(),
                         .logits = logits.data_ptr<float>() + row * logits.size(1),
                         .ld_logits = logits.size(1),
                         .out = out.data() + row,
                         .rows = rows,
                         .batch_rows = packed.rows() - row,
                         .width = width};
    check(args);
    simt::launch({.x = rows,
                  .threads = kThreads,
                  .shared_bytes = static_cast<size_t>(score_shared_bytes(kThreads)),
                  .seed = seed},
                 [&](const Thread& t) { score_body(t, args); });
  }
  return out;
}

TEST(ScoreBody, is_logsumexp_rank_and_largest_of_aten) {
  for (const int32_t width : {7, 20, 203, 3000}) {
    Random random(static_cast<uint32_t>(width));
    const Packed packed({5, 1, 4}, 2, width, random);
    const std::vector<int32_t> next_tokens = {3, -1, width - 1};
    at::Tensor logits = random.floats({packed.rows(), width + 5}, 4.0);
    logits.narrow(0, 0, 3).round_();  // ties
    const auto got = scores(logits, width, packed, next_tokens, 12, 1);
    const at::Tensor used = logits.narrow(1, 0, width);
    const at::Tensor lse = at::logsumexp(used.to(at::kDouble), {1});
    const auto [values, ids] = at::sort(used, /*stable=*/true, 1, /*descending=*/true);
    const std::vector<int32_t> after = {
        packed.tokens[1], packed.tokens[2], packed.tokens[3], packed.tokens[4], 3, -1,
        packed.tokens[7], packed.tokens[8], packed.tokens[9], width - 1};
    for (int32_t row = 0; row < 10; ++row) {
      const PromptScore& score = got[static_cast<size_t>(row)];
      EXPECT_NEAR(score.log_sum_exp, lse[row].item<double>(), 1e-5) << row;
      for (int32_t i = 0; i < PromptScore::kTop; ++i) {
        const bool is_token = i < width;
        EXPECT_EQ(score.top_ids[i], is_token ? ids[row][i].item<int64_t>() : -1) << row;
        EXPECT_EQ(score.top_logits[i], is_token ? values[row][i].item<float>() : -kInfinity);
      }
      const int32_t target = after[static_cast<size_t>(row)];
      if (target < 0) {
        EXPECT_EQ(score.rank, 0);
        EXPECT_TRUE(std::isnan(score.target_logit));
        continue;
      }
      const at::Tensor its = used[row][target];
      EXPECT_EQ(score.target_logit, its.item<float>());
      EXPECT_EQ(score.rank, 1 + (used[row] > its).sum().item<int64_t>());
    }
    EXPECT_EQ(got[10].log_sum_exp, 0.0f) << "padding is left as it is";
  }
}

TEST(ScoreBody, depends_neither_on_steps_nor_on_the_order_of_threads) {
  Random random(3);
  const Packed packed({9, 8}, 0, 500, random);
  const at::Tensor logits = random.floats({17, 500}, 3.0);
  const auto whole = scores(logits, 500, packed, {1, 2}, 17, 1);
  for (const int32_t step : {1, 4, 9}) {
    const auto cut = scores(logits, 500, packed, {1, 2}, step, static_cast<uint32_t>(step));
    EXPECT_EQ(std::memcmp(cut.data(), whole.data(), whole.size() * sizeof(PromptScore)), 0);
  }
}

TEST(ScoreBody, row_with_nan_or_nothing_left_has_no_score) {
  Random random(4);
  const Packed packed({3}, 0, 100, random);
  at::Tensor logits = random.floats({3, 100});
  logits[0][40] = std::nanf("");
  logits[1].fill_(-kInfinity);
  logits[2].narrow(0, 0, 90).fill_(-kInfinity);
  const auto got = scores(logits, 100, packed, {-1}, 3, 1);
  EXPECT_TRUE(std::isnan(got[0].log_sum_exp));
  EXPECT_TRUE(std::isnan(got[1].log_sum_exp));
  EXPECT_NEAR(got[2].log_sum_exp, at::logsumexp(logits[2], {0}).item<float>(), 1e-5);
  EXPECT_GE(got[2].top_ids[0], 90);
  EXPECT_EQ(got[2].top_ids[10], 0) << "of equal ones the lowest";
}

at::Tensor means(const at::Tensor& in, int32_t width, const Packed& packed, int32_t step) {
  at::Tensor out = at::full({static_cast<int64_t>(packed.last_rows.size()), width + 3}, NAN);
  for (int32_t row = 0; row < packed.rows(); row += step) {
    const PoolArgs args{.batch = packed.from(row),
                        .last_rows = packed.last_rows.data(),
                        .in = in.data_ptr<float>() + row * in.size(1),
                        .ld_in = in.size(1),
                        .out = out.data_ptr<float>(),
                        .ld_out = out.size(1),
                        .row_begin = row,
                        .rows = std::min(step, packed.rows() - row),
                        .width = width};
    check(args);
    simt::launch({.x = (width + kThreads - 1) / kThreads, .threads = kThreads},
                 [&](const Thread& t) { pool_body(t, args); });
  }
  return out.narrow(1, 0, width);
}

TEST(PoolBody, is_the_mean_of_aten_whatever_the_steps) {
  Random random(5);
  const Packed packed({6, 1, 10}, 3, 9, random);
  const int32_t width = 100;
  const at::Tensor in = random.floats({packed.rows(), width + 4});
  const at::Tensor whole = means(in, width, packed, packed.rows());
  int64_t begin = 0;
  for (size_t i = 0; i < packed.last_rows.size(); ++i) {
    const int64_t end = packed.last_rows[i] + 1;
    const at::Tensor mean = in.narrow(1, 0, width).narrow(0, begin, end - begin).mean(0);
    EXPECT_LT((whole[static_cast<int64_t>(i)] - mean).abs().max().item<float>(), 1e-6) << i;
    begin = end;
  }
  for (const int32_t step : {1, 4, 7})
    EXPECT_TRUE(means(in, width, packed, step).equal(whole)) << step;
}

TEST(ScoreArgs, refusals_name_the_field) {
  const auto refusal = [](const auto& args) {
    try {
      check(args);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_NE(refusal(ScoreArgs{.rows = 2, .batch_rows = 1}).find("batch_rows: got 1"),
            std::string::npos);
  EXPECT_NE(refusal(ScoreArgs{.rows = 1, .batch_rows = 1, .width = 0}).find("width: got 0"),
            std::string::npos);
  EXPECT_NE(refusal(PoolArgs{.row_begin = -1, .rows = 1}).find("row_begin: got -1"),
            std::string::npos);
  EXPECT_NE(refusal(PoolArgs{.ld_in = 8, .ld_out = 4, .rows = 1, .width = 8}).find("ld_out: got 4"),
            std::string::npos);
}

}  // namespace
}  // namespace flowprefill
