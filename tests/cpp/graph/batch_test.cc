// What a batch must keep to, and what follows from it.
#include "graph/batch.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <stdexcept>

#include "graph/sampling_params.h"
#include "graph_fixture.h"

namespace flowprefill::testing {
namespace {

constexpr BatchLimits kLimits{.vocab_size = 100,
                              .block_tokens = 4,
                              .blocks = 20,
                              .max_tokens = 12,
                              .max_sequences = 3,
                              .max_context = 24};

// Two sequences: 5 tokens, and 3 on top of 6.
Batch good() {
  Batch batch = batch_with({{5, 0}, {3, 6}});
  batch.sequences[0].block_table = {1, 2};
  batch.sequences[1].block_table = {3, 4, 19};
  return batch;
}

std::string message(const std::function<void(Batch&)>& change, const BatchLimits& limits) {
  Batch batch = good();
  change(batch);
  try {
    check(batch, limits);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void expect_told(const std::function<void(Batch&)>& change, const std::vector<std::string>& parts) {
  const std::string text = message(change, kLimits);
  for (const std::string& part : parts)
    EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks '" << part << "'";
}

TEST(Batch, that_fits_passes) {
  EXPECT_EQ(message([](Batch&) {}, kLimits), "");
  BatchLimits none = kLimits;
  none.max_tokens = none.max_sequences = none.max_context = 0;
  EXPECT_EQ(message([](Batch&) {}, none), "") << "0: no limit";
}

TEST(Batch, that_does_not_fit_is_told_by_field_value_and_limit) {
  expect_told([](Batch& b) { b = {}; }, {"tokens", "0", "at least 1"});
  expect_told([](Batch& b) { b.sequences.clear(); }, {"sequences", "0", "at least 1"});
  expect_told([](Batch& b) { b.tokens.resize(13); }, {"tokens", "13", "max_tokens = 12"});
  expect_told([](Batch& b) { b.sequences.resize(4); }, {"sequences", "4", "max_sequences = 3"});
  expect_told([](Batch& b) { b.tokens[3] = 100; }, {"token id", "100", "0..99"});
  expect_told([](Batch& b) { b.tokens[3] = -1; }, {"token id", "-1"});
  expect_told([](Batch& b) { b.tokens.pop_back(); }, {"rows", "8", "7"});
  expect_told([](Batch& b) { b.sequences[1].row_begin = 4; }, {"sequence 1", "first row", "4"});
  expect_told([](Batch& b) { b.sequences[0].rows = 0; }, {"sequence 0", "tokens", "0"});
  expect_told([](Batch& b) { b.sequences[1].context = -1; }, {"sequence 1", "context", "-1"});
  expect_told([](Batch& b) { b.sequences[1].context = 22; }, {"25", "max_context = 24"});
  expect_told([](Batch& b) { b.sequences[1].context = std::numeric_limits<int32_t>::max(); },
              {"sequence 1", "2^31"});
  expect_told([](Batch& b) { b.sequences[1].block_table.pop_back(); },
              {"sequence 1", "KV blocks", "2", "at least 3"});
  expect_told([](Batch& b) { b.sequences[0].block_table[1] = 20; },
              {"sequence 0", "KV block", "20", "0..19"});
}

TEST(Batch, knows_its_rows) {
  const Batch batch = good();
  EXPECT_EQ(sequence_of_rows(batch), (std::vector<int32_t>{0, 0, 0, 0, 0, 1, 1, 1}));
  EXPECT_EQ(last_rows(batch), (std::vector<int32_t>{4, 7}));
  EXPECT_EQ(batch.sequences[1].length(), 9);
  EXPECT_EQ(blocks_of(8, 4), 2);
  EXPECT_EQ(blocks_of(9, 4), 3);
  EXPECT_EQ(blocks_of(std::numeric_limits<int32_t>::max(), 16), 1 << 27);
}

TEST(Sampling, that_cannot_be_is_told) {
  const auto told = [](const SamplingParams& params, int32_t sequences) {
    try {
      check(std::span(&params, 1), sequences);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(told({}, 1), "");
  EXPECT_NO_THROW(check(std::span<const SamplingParams>(), 7));
  EXPECT_NE(told({}, 2).find("sampling"), std::string::npos);
  EXPECT_NE(told({.temperature = -1}, 1).find("temperature"), std::string::npos);
  EXPECT_NE(told({.temperature = std::numeric_limits<float>::infinity()}, 1).find("temperature"),
            std::string::npos);
  EXPECT_NE(told({.top_k = -1}, 1).find("top_k"), std::string::npos);
  EXPECT_NE(told({.top_p = 0}, 1).find("top_p"), std::string::npos);
  EXPECT_NE(told({.min_p = 1.5f}, 1).find("min_p"), std::string::npos);
  EXPECT_NE(told({.uniform = 1}, 1).find("uniform"), std::string::npos);
}

}  // namespace
}  // namespace flowprefill::testing
