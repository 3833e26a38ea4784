// Index logic of the attention kernel without ATen: tiles, fragment maps, page walk.
#include <gtest/gtest.h>

#include <array>
#include <map>
#include <random>
#include <set>

#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/mma_layout.h"

namespace flowprefill {
namespace {

int32_t last_entry(const AttentionTile& tile) {
  return std::min(tile.entry + kAttentionEntries, tile.entries) - 1;
}

TEST(AttentionTiles, CoverEveryRowAndHeadOnceLongestFirst) {
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    const auto group = static_cast<int32_t>(random() % 9 + 1);
    std::vector<AttentionSlice> slices;
    int32_t rows = 0;
    for (uint32_t i = random() % 5 + 1; i > 0; --i) {
      const auto count = static_cast<int32_t>(random() % 150 + 1);
      slices.push_back({rows, count, static_cast<int32_t>(random() % 1000),
                        static_cast<int32_t>(slices.size())});
      rows += count;
    }
    const auto tiles = attention_tiles(slices, group);
    EXPECT_LE(static_cast<int32_t>(tiles.size()),
              max_attention_tiles(rows, static_cast<int32_t>(slices.size()), group));
    std::map<std::pair<int32_t, int32_t>, int> seen;  // (row, head in group)
    int32_t keys_before = INT32_MAX;
    for (const AttentionTile& tile : tiles) {
      const AttentionSlice& slice = slices[static_cast<size_t>(tile.sequence - 1)];
      EXPECT_EQ(tile.row, slice.row);
      EXPECT_EQ(tile.position, slice.position);
      for (int32_t e = tile.entry; e <= last_entry(tile); ++e)
        ++seen[{tile.row + e / group, e % group}];
      const int32_t keys = tile.position + last_entry(tile) / group + 1;
      EXPECT_LE(keys, keys_before);
      keys_before = keys;
    }
    EXPECT_EQ(seen.size(), static_cast<size_t>(rows * group));
    for (const auto& [entry, times] : seen)
      ASSERT_EQ(times, 1) << "row " << entry.first << ", head " << entry.second;
  }
}

TEST(AttentionTiles, RefusesWhatNoKernelCanTake) {
  const auto message = [](const AttentionSlice& slice, int32_t group) -> std::string {
    try {
      attention_tiles(std::vector<AttentionSlice>{slice}, group);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message({0, 0, 0, 0}, 1), "rows: got 0, expected at least 1");
  EXPECT_EQ(message({-1, 1, 0, 0}, 1), "row: got -1, expected at least 0");
  EXPECT_EQ(message({0, 1, -4, 0}, 1), "position: got -4, expected at least 0");
  EXPECT_EQ(message({0, 1, 0, -1}, 1), "sequence: got -1, expected at least 0");
  EXPECT_EQ(message({0, 1, 0, 0}, 0), "heads_per_kv: got 0, expected at least 1");
  EXPECT_EQ(message({0, INT32_MAX, 0, 0}, 2),
            "rows: got 2147483647, expected rows times query heads per KV head below 2^31");
}

TEST(Fragments, EveryElementOfEveryOperandLiesInOnePlace) {
  std::array<std::array<int, 16>, 16> a = {};
  std::array<std::array<int, 8>, 16> b = {};
  std::array<std::array<int, 8>, 16> c = {};
  const auto at = [](auto& matrix, int32_t row, int32_t column) -> int& {
    return matrix.at(static_cast<size_t>(row)).at(static_cast<size_t>(column));
  };
  for (int32_t lane = 0; lane < 32; ++lane) {
    for (int32_t pair = 0; pair < 2; ++pair) {
      for (int32_t i = 0; i < 4; ++i)
        ++at(a, a_row(lane, i), a_column(lane, i) + pair);
      for (int32_t i = 0; i < 2; ++i)
        ++at(b, b_row(lane, i) + pair, b_column(lane));
    }
    for (int32_t i = 0; i < 4; ++i)
      ++at(c, c_row(lane, i), c_column(lane, i));
  }
  for (const auto& row : a)
    for (const int times : row)
      EXPECT_EQ(times, 1);
  for (const auto& row : b)
    for (const int times : row)
      EXPECT_EQ(times, 1);
  for (const auto& row : c)
    for (const int times : row)
      EXPECT_EQ(times, 1);
}

// Spot values of the PTX ISA's figures for mma.m16n8k16 with .bf16.
TEST(Fragments, LieWhereThePtxManualSays) {
  EXPECT_EQ(std::pair(a_row(5, 0), a_column(5, 0)), std::pair(1, 2));      // a0, a1: T5
  EXPECT_EQ(std::pair(a_row(5, 1), a_column(5, 1)), std::pair(9, 2));      // a2, a3
  EXPECT_EQ(std::pair(a_row(5, 2), a_column(5, 2)), std::pair(1, 10));     // a4, a5
  EXPECT_EQ(std::pair(a_row(31, 3), a_column(31, 3)), std::pair(15, 14));  // a6, a7
  EXPECT_EQ(std::pair(b_row(6, 0), b_column(6)), std::pair(4, 1));
  EXPECT_EQ(std::pair(b_row(6, 1), b_column(6)), std::pair(12, 1));
  EXPECT_EQ(std::pair(c_row(7, 1), c_column(7, 1)), std::pair(1, 7));
  EXPECT_EQ(std::pair(c_row(7, 2), c_column(7, 2)), std::pair(9, 6));
}

// The scores' registers are the left operand of the value product as they lie.
TEST(Fragments, ScoresOfTwoColumnsAreOneLeftOperand) {
  for (int32_t lane = 0; lane < 32; ++lane) {
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t column = i / 2;         // which 8-wide score column
      const int32_t element = 2 * (i % 2);  // first of the two elements packed
      EXPECT_EQ(a_row(lane, i), c_row(lane, element));
      EXPECT_EQ(a_column(lane, i), 8 * column + c_column(lane, element));
    }
  }
}

TEST(PageWalk, EveryTokenHasItsOwnSlot) {
  for (int32_t shift = 0; shift < 6; ++shift) {
    const int32_t block_tokens = 1 << shift;
    const std::vector<int32_t> table = {5, 0, 3, 1, 7};
    const CacheView cache{nullptr,           nullptr, /*block_stride=*/1000, /*token_stride=*/10,
                          /*head_stride=*/0, shift};
    std::set<int64_t> offsets;
    for (int32_t position = 0; position < 5 * block_tokens; ++position) {
      const int64_t offset = cache.offset(table.data(), position);
      EXPECT_EQ(offset / 1000, table[static_cast<size_t>(position / block_tokens)]);
      EXPECT_EQ(offset % 1000, 10 * (position % block_tokens));
      offsets.insert(offset);
    }
    EXPECT_EQ(offsets.size(), static_cast<size_t>(5 * block_tokens));
  }
}

// The 8 rows of a matrix that one ldmatrix reads must lie in 8 different groups of 4 banks.
TEST(SharedMemory, RowsOfAMatrixLieInDifferentBanks) {
  for (const int32_t dim : {64, 96, 128, 256}) {
    const int32_t rows = 2 * attention_keys(dim) + (shares_queries(dim) ? kAttentionEntries : 0);
    const auto stride = static_cast<int32_t>(attention_shared_bytes(dim)) / rows;
    std::set<int32_t> groups;
    for (int32_t row = 0; row < 8; ++row)
      groups.insert(row * stride / 16 % 8);
    EXPECT_EQ(groups.size(), 8u) << "head_dim " << dim;
    EXPECT_EQ(stride % 16, 0);
  }
}

}  // namespace
}  // namespace flowprefill
