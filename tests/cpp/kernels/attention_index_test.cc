// Index logic of the attention kernel without ATen: tiles, fragment maps, page walk.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <set>

#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/attention_boxes.h"
#include "devices/cuda/kernels/attention_split.h"
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

// The boxes of a tile bring each of its keys once, in order, and look at no entry beyond the keys.
TEST(AttentionBoxes, BringEveryKeyOfATile) {
  constexpr int32_t kKeys = 300;
  for (const int32_t tile_keys : {32, 64, 80, 96, 112, 128, 176}) {
    for (int32_t block_shift = 3; block_shift <= 9; ++block_shift) {
      const AttentionBoxes boxes(tile_keys, block_shift);
      ASSERT_EQ(tile_keys % boxes.tokens(), 0);
      ASSERT_GE(boxes.tokens(), kLeastBoxTokens);
      ASSERT_EQ((1 << block_shift) % boxes.tokens(), 0);
      std::vector<int32_t> table;  // ends with the keys
      for (int32_t block = 0; block << block_shift < kKeys; ++block)
        table.push_back(50 - block);
      for (int32_t at = 0; at < kKeys + tile_keys; at += boxes.tokens()) {
        if (at >= kKeys) {
          EXPECT_EQ(boxes.block(table.data(), at, kKeys), -1);
          continue;
        }
        const int32_t block = boxes.block(table.data(), at, kKeys);
        ASSERT_LE(boxes.slot(at) + boxes.tokens(), 1 << block_shift);
        for (int32_t row = 0; row < boxes.tokens(); ++row) {
          EXPECT_EQ(boxes.within(at + row), row);
          EXPECT_EQ(((50 - block) << block_shift) + boxes.slot(at) + row, at + row);
        }
      }
    }
  }
}

// (kv heads, heads per KV head) of models.
constexpr std::pair<int32_t, int32_t> kHeads[] = {{8, 4}, {1, 8}, {2, 16}, {32, 1}, {5, 3}};

// Every key that an entry sees lies in one tile of the entry, every partial row has one writer.
TEST(AttentionSplit, ChunksCoverEveryKeyOnce) {
  std::mt19937 random(4);
  for (int round = 0; round < 300; ++round) {
    const auto [kv_heads, group] = kHeads[random() % std::size(kHeads)];
    const AttentionSplit split{132, group, kv_heads};
    std::vector<AttentionSlice> slices;
    int64_t partial_rows = 0;
    int32_t rows = 0;
    for (uint32_t i = random() % 4 + 1; i > 0; --i) {
      const auto count = static_cast<int32_t>(random() % (random() % 2 == 0 ? 3 : 90) + 1);
      const auto context = static_cast<int32_t>(random() % 9000);
      slices.push_back({rows, count, context, static_cast<int32_t>(slices.size()),
                        split.chunk_keys(count, context + count)});
      rows += count;
      partial_rows += partial_rows_of(slices.back(), group);
    }
    const auto tiles = attention_tiles(slices, group);
    const auto count = static_cast<int32_t>(slices.size());
    const AttentionNeeds needs = split.needs(rows, count, 9100);
    EXPECT_LE(static_cast<int32_t>(tiles.size()), needs.num_tiles);
    EXPECT_LE(static_cast<int32_t>(attention_merges(tiles).size()), needs.num_merges);
    EXPECT_LE(partial_rows, needs.partial_rows);
    std::map<std::pair<int32_t, int32_t>, int32_t> keys;  // of (row, head in group): seen so far
    std::set<int64_t> written;
    auto by_chunk = tiles;
    std::ranges::sort(by_chunk, {}, &AttentionTile::chunk);
    for (const AttentionTile& tile : by_chunk) {
      for (int32_t e = tile.entry; e <= last_entry(tile); ++e) {
        const int32_t end = tile.position + e / group + 1;
        int32_t& before = keys[{tile.row + e / group, e % group}];
        if (tile.chunk_keys == 0) {
          before += end;
          continue;
        }
        const int32_t begin = tile.chunk * tile.chunk_keys;
        EXPECT_EQ(before, std::min(begin, end)) << "a chunk was left out";
        before += std::max(0, std::min(end, begin + tile.chunk_keys) - begin);
        const int64_t row = tile.partial + int64_t{tile.chunk} * tile.entries + e;
        EXPECT_TRUE(written.insert(row).second);
        EXPECT_LT(row, partial_rows);
      }
    }
    EXPECT_EQ(keys.size(), static_cast<size_t>(rows * group));
    for (const AttentionSlice& s : slices) {
      for (int32_t i = 0; i < s.rows * group; ++i)
        EXPECT_EQ((keys[{s.row + i / group, i % group}]), s.position + i / group + 1);
    }
  }
}

// Of an H100, an A100 and a B200: one sequence at 32k keys has a block for every multiprocessor.
TEST(AttentionSplit, FewRowsOnALongContextFillTheCard) {
  for (const int32_t units : {132, 108, 148}) {
    for (const auto& [kv_heads, group] : kHeads) {
      for (const int32_t rows : {1, 2, 16, 64}) {
        const AttentionSplit split{units, group, kv_heads};
        const std::vector<AttentionSlice> slice = {
            {0, rows, 32768 - rows, 0, split.chunk_keys(rows, 32768)}};
        const auto blocks = static_cast<int32_t>(attention_tiles(slice, group).size()) * kv_heads;
        EXPECT_GE(blocks, units) << kv_heads << " KV heads, " << rows << " rows";
      }
    }
  }
}

TEST(AttentionSplit, SequencesOfAtMost16EntriesDecode) {
  EXPECT_TRUE((AttentionSplit{132, 4, 8}.is_decode(4)));
  EXPECT_FALSE((AttentionSplit{132, 4, 8}.is_decode(5)));
  EXPECT_TRUE((AttentionSplit{0, 16, 2}.is_decode(1)));
  EXPECT_FALSE((AttentionSplit{132, 17, 2}.is_decode(1)));
  const std::vector<AttentionSlice> slice = {
      {.row = 0, .rows = 2, .position = 100, .sequence = 0, .chunk_keys = 64, .is_decode = true}};
  for (const AttentionTile& tile : attention_tiles(slice, 8))
    EXPECT_EQ(tile.is_decode, 1);
  EXPECT_EQ(attention_tiles(slice, 8).size(), 2u);
}

// What the kernel declares fits twice: an A100's multiprocessor has 164 KiB, a block takes 1 more.
TEST(AttentionSharedMemory, LeavesRoomForTwoBlocks) {
  for (const int32_t head_dim : {64, 96, 128, 256})
    EXPECT_LE(2 * (attention_shared_bytes(head_dim) + 1024), size_t{164} * 1024) << head_dim;
}

TEST(AttentionSplit, ManyRowsOrFewKeysAreNotSplit) {
  const AttentionSplit split{132, 4, 8};
  EXPECT_EQ(split.chunk_keys(2048, 131072), 0);
  EXPECT_EQ(split.chunk_keys(272, 131072), 0) << "17 tiles of 8 KV heads are 136 blocks";
  EXPECT_GT(split.chunk_keys(256, 131072), 0) << "16 are 128";
  EXPECT_EQ(split.chunk_keys(1, 383), 0);
  EXPECT_EQ(split.chunk_keys(1, 384), 192);
  EXPECT_EQ((AttentionSplit{0, 4, 8}.chunk_keys(1, 131072)), 0) << "a device that is not known";
  const AttentionNeeds short_ones = split.needs(64, 64, 383);
  EXPECT_EQ(short_ones.num_merges, 0);
  EXPECT_EQ(short_ones.partial_rows, 0);
  EXPECT_EQ(short_ones.num_tiles, max_attention_tiles(64, 64, 4));
}

// What the scheduler of Hopper's kernel makes of its list, on the host: every (row, query head)
// once, with the keys it may see, by blocks that take items in turn; no block much longer than
// another.
TEST(AttentionRowTiles, BlocksCoverEveryRowAndHeadOnce) {
  constexpr int32_t kBlocks = 132;
  std::mt19937 random(6);
  for (int round = 0; round < 100; ++round) {
    const int32_t dim = std::array{64, 128, 256}.at(random() % 3);
    const auto heads = static_cast<int32_t>(random() % 33 + 1);
    const int32_t size = attention_rows_of_tile(dim);
    std::vector<AttentionSlice> slices;
    int32_t rows = 0;
    for (uint32_t i = random() % 6 + 1; i > 0; --i) {
      const auto count = static_cast<int32_t>(random() % 1500 + 1);
      slices.push_back({rows, count, static_cast<int32_t>(random() % 9000),
                        static_cast<int32_t>(slices.size())});
      rows += count;
    }
    auto tiles = attention_row_tiles(slices, dim);
    const auto sequences = static_cast<int32_t>(slices.size());
    ASSERT_LE(static_cast<int32_t>(tiles.size()), max_attention_row_tiles(rows, sequences, dim));
    tiles.resize(tiles.size() + random() % 5);  // padding
    std::map<std::pair<int32_t, int32_t>, int32_t> keys;
    std::array<int64_t, kBlocks> work = {};
    const auto items = static_cast<int32_t>(tiles.size()) * heads;
    int64_t longest = 0;
    for (int32_t block = 0; block < kBlocks; ++block) {
      for (int32_t turn = 0;; ++turn) {
        const int32_t item = item_of_turn(turn, block, kBlocks);
        if (item >= items)
          break;
        const AttentionTile& tile = tiles[static_cast<size_t>(item / heads)];
        if (tile.sequence == 0)
          break;
        ASSERT_EQ(tile.entry % size, 0);
        const int32_t end = std::min(tile.entry + size, tile.entries);
        for (int32_t row = tile.entry; row < end; ++row) {
          const int32_t seen = tile.position + tile.entries - (tile.entries - row) + 1;
          ASSERT_TRUE(keys.insert({{tile.row + row, item % heads}, seen}).second);
        }
        work[static_cast<size_t>(block)] += tile.position + end;
        longest = std::max<int64_t>(longest, tile.position + end);
      }
    }
    ASSERT_EQ(keys.size(), static_cast<size_t>(rows) * static_cast<size_t>(heads));
    for (const AttentionSlice& s : slices) {
      for (int32_t i = 0; i < s.rows; ++i)
        ASSERT_EQ((keys[{s.row + i, heads - 1}]), s.position + i + 1);
    }
    const auto [least, most] = std::ranges::minmax(work);
    EXPECT_LE(most - least, longest) << "items are sorted, so turns differ by less than the first";
  }
}

// 2,048 rows of 32 heads: tiles of 1 to 16 units of work, 33 for each block on average.
TEST(AttentionRowTiles, BlocksHaveNearlyEqualWork) {
  constexpr int32_t kBlocks = 132, kHeads = 32, kItems = 16 * kHeads;
  int32_t most = 0;
  for (int32_t block = 0; block < kBlocks; ++block) {
    int32_t work = 0;
    for (int32_t turn = 0; item_of_turn(turn, block, kBlocks) < kItems; ++turn)
      work += 16 - item_of_turn(turn, block, kBlocks) / kHeads;
    most = std::max(most, work);
  }
  EXPECT_LE(most, 34);
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
  EXPECT_EQ(message({0, 1, 0, 0, 100}, 1),
            "chunk_keys: got 100, expected a multiple of 64 (0: not split)");
  EXPECT_EQ(message({0, 1, 0, 0}, 0), "heads_per_kv: got 0, expected at least 1");
  EXPECT_EQ(message({0, INT32_MAX, 0, 0}, 2),
            "rows: got 2147483647, expected rows times query heads per KV head below 2^31");
  EXPECT_EQ(message({0, 5, 0, 0, 0, true}, 4),
            "rows: got 5, expected rows times query heads per KV head at most 16 for decoding");
}

TEST(AttentionRowTiles, RefuseRowsThatEndInDifferentChunks) {
  const auto message = [](const AttentionSlice& slice) -> std::string {
    try {
      attention_row_tiles(std::vector<AttentionSlice>{slice}, 128);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_EQ(message({0, 128, 128, 0, 128}), "accepted");
  EXPECT_EQ(message({0, 129, 128, 0, 128}),
            "rows: got 129, expected rows that end in the chunk in which the first does");
  EXPECT_EQ(message({0, 8, 128, 0, 192}),
            "chunk_keys: got 192, expected a multiple of 128 (0: not split)");
  EXPECT_EQ(message({0, 8, 128, 0, 0, true}), "is_decode: got 1, expected 0: of many rows");
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
    const auto stride = static_cast<int32_t>(sizeof(Bf16)) * attention_stride(dim);
    std::set<int32_t> groups;
    for (int32_t row = 0; row < 8; ++row)
      groups.insert(row * stride / 16 % 8);
    EXPECT_EQ(groups.size(), 8u) << "head_dim " << dim;
    EXPECT_EQ(stride % 16, 0);
  }
}

}  // namespace
}  // namespace flowprefill
