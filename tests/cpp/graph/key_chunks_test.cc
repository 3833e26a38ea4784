// Chunks of keys: where they begin, how many there are, what rows share them.
#include "graph/key_chunks.h"

#include <gtest/gtest.h>

#include <random>

namespace flowprefill::testing {
namespace {

// Query heads of models.
constexpr int32_t kHeads[] = {1, 8, 12, 28, 32, 64, 128, 200};

TEST(KeyChunks, rows_up_to_32k_have_none) {
  for (const int32_t heads : kHeads) {
    const KeyChunks chunks = KeyChunks::of(heads, 132);
    EXPECT_FALSE(chunks.has_any(32768));
    EXPECT_TRUE(chunks.has_any(32769));
    for (const int32_t position : {0, 4095, 32767}) {
      EXPECT_EQ(chunks.keys_at(position), 0);
      EXPECT_EQ(chunks.count_at(position), 1);
      EXPECT_EQ(chunks.end_at(position), 32768);
    }
    EXPECT_GT(chunks.keys_at(32768), 0);
  }
}

TEST(KeyChunks, no_row_has_any_where_the_device_takes_none) {
  const KeyChunks none = KeyChunks::of(32, 0);
  EXPECT_FALSE(none.has_any(1 << 20));
  EXPECT_EQ(none.keys_at(1 << 20), 0);
  EXPECT_EQ(none.count_at(1 << 20), 1);
  EXPECT_EQ(none.end_at(1 << 20), INT32_MAX);
}

// 32 heads are four tiles of a head for 128 of 132 multiprocessors.
TEST(KeyChunks, tiles_of_all_heads_and_chunks_give_work_to_the_multiprocessors) {
  const KeyChunks chunks = KeyChunks::of(32, 132);
  EXPECT_EQ(chunks.count_at(32768), 4);
  EXPECT_EQ(chunks.keys_at(32768), 34816 / 4);
  EXPECT_EQ(chunks.count_at(131071), 4);
  EXPECT_EQ(chunks.keys_at(131071), 32768);
  EXPECT_EQ(chunks.count_at(131072), 8) << "twice as many, of half the heads at once";
  for (const int32_t heads : {8, 12, 28, 32, 64}) {
    for (const int32_t position : {40000, 90000, 131071}) {
      const int32_t tiles = heads * KeyChunks::of(heads, 132).count_at(position);
      const int32_t turns = (tiles + 131) / 132;
      EXPECT_GE(tiles, 110 * turns) << heads << " heads at " << position;
    }
  }
}

TEST(KeyChunks, rows_that_share_chunks_end_in_the_same_one) {
  std::mt19937 random(3);
  for (int round = 0; round < 4000; ++round) {
    KeyChunks chunks = KeyChunks::of(kHeads[random() % std::size(kHeads)], 132);
    chunks.step = random() % 2 == 0 ? 128 : 256;
    const auto position = static_cast<int32_t>(32768 + random() % (1 << (random() % 5 + 16)));
    const int32_t keys = chunks.keys_at(position);
    const int32_t end = chunks.end_at(position);
    ASSERT_EQ(keys % chunks.step, 0);
    ASSERT_GE(keys, chunks.rows) << "InputLayout counts on it";
    ASSERT_LE(keys, chunks.most_keys + chunks.step);
    ASSERT_LE(position / keys + 1, chunks.count_at(position));
    ASSERT_GT(end, position);
    for (const int32_t other : {end - 1, (position + end) / 2}) {
      ASSERT_EQ(chunks.keys_at(other), keys);
      ASSERT_EQ(other / keys, position / keys);
      ASSERT_EQ(chunks.end_at(other), end);
    }
    ASSERT_TRUE(end % keys == 0 || end % chunks.rows == 0) << "no end without a reason";
    ASSERT_LE(chunks.count_at(position), chunks.count_at(end)) << "lists have room by the longest";
  }
}

TEST(KeyChunks, positions_may_be_as_large_as_an_int) {
  const KeyChunks chunks = KeyChunks::of(32, 132);
  EXPECT_GT(chunks.keys_at(INT32_MAX - 1), 0);
  EXPECT_EQ(chunks.end_at(INT32_MAX - 1), INT32_MAX);
}

}  // namespace
}  // namespace flowprefill::testing
