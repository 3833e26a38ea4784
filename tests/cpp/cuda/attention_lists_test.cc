// The lists of Hopper's attention for random batches of long and short sequences, cut anywhere:
// each row sees each of its keys once, in the chunks that its position says, and every partial
// result has one writer and one reader.
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <random>
#include <set>

#include "../graph_fixture.h"
#include "devices/cuda/backend/batch_inputs.h"

namespace flowprefill::testing {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kRounds = 8;  // each is some ten times slower
#else
constexpr int kRounds = 25;
#endif
constexpr int32_t kBlockTokens = 64;
constexpr int32_t kTableStride = 4096;  // blocks: 256k tokens

struct Heads {
  int32_t heads, kv_heads, head_dim;
};
constexpr Heads kModels[] = {{32, 8, 128}, {8, 8, 64}, {64, 8, 128}, {28, 4, 128}, {16, 1, 256}};

class AttentionListsTest : public ::testing::Test {
 protected:
  void set_model(const Heads& heads) {
    graph_ = llama_graph({.windows = {0, 512}});
    graph_.attention = {
        .heads = heads.heads, .kv_heads = heads.kv_heads, .head_dim = heads.head_dim};
  }
  AttentionRules rules() const { return {graph_, 132, kBlockTokens, /*uses_hopper=*/true}; }
  int32_t group() const { return graph_.attention.heads_per_kv(); }

  void add_sequence(int32_t rows, int32_t context) {
    Sequence s{.row_begin = batch_.rows(), .rows = rows, .context = context, .block_table = {}};
    s.block_table.resize(static_cast<size_t>(blocks_of(s.length(), kBlockTokens)));
    batch_.sequences.push_back(std::move(s));
    batch_.tokens.resize(batch_.tokens.size() + static_cast<size_t>(rows));
  }
  uint32_t random(uint32_t below) { return random_() % below; }
  void make_batch() {
    batch_ = {};
    for (uint32_t i = random(4) + 1; i > 0; --i) {
      const uint32_t rows = random(3) == 0 ? random(150) : random(7000);
      add_sequence(static_cast<int32_t>(rows + 1), static_cast<int32_t>(random(200000)));
    }
  }
  // Everything in up to three slices, for operators with windows or without.
  std::vector<AttentionRows> cut_anywhere(bool is_windowed) {
    std::set<int32_t> ends = {batch_.rows()};
    for (uint32_t i = random(3); i > 0; --i)
      ends.insert(static_cast<int32_t>(random(static_cast<uint32_t>(batch_.rows()))));
    std::vector<AttentionRows> rows;
    int32_t begin = 0;
    for (const int32_t end : ends) {
      if (end > begin)
        rows.push_back({begin, end, begin, is_windowed});
      begin = std::max(begin, end);
    }
    return rows;
  }

  static std::vector<AttentionTile> list(const std::vector<std::byte>& bytes, size_t offset,
                                         int32_t count) {
    std::vector<AttentionTile> tiles(static_cast<size_t>(count));
    if (count > 0)
      std::memcpy(tiles.data(), bytes.data() + offset, tiles.size() * sizeof(AttentionTile));
    std::erase_if(tiles, [](const AttentionTile& tile) { return tile.sequence == 0; });
    return tiles;
  }

  // Of one launch: rows of partial results by the row of the batch and head that they belong to.
  using Partials = std::map<std::pair<int32_t, int32_t>, std::set<int64_t>>;

  void expect_tiles_are_right(const std::vector<AttentionTile>& tiles, const AttentionRows& rows,
                              Partials& written) {
    const int32_t size = attention_rows_of_tile(graph_.attention.head_dim);
    std::set<int64_t> all;
    for (const AttentionTile& tile : tiles) {
      const Sequence& s = batch_.sequences[static_cast<size_t>(tile.sequence) - 1];
      const AttentionItem item = item_of_tile(tile, size);
      for (int32_t e = tile.entry; e < std::min(tile.entry + size, tile.entries); ++e) {
        const int32_t row = rows.base + tile.row + e;
        const int32_t position = s.context + row - s.row_begin;
        ASSERT_EQ(tile.chunk_keys, rows.is_windowed ? 0 : rules().chunks.keys_at(position));
        const int32_t of_item = item.q_tile * size + e - tile.entry;
        ASSERT_EQ(item.row + of_item, tile.row + e) << "the row that it loads";
        ASSERT_EQ(item.first_key % kBlockTokens, 0);
        ASSERT_EQ(item.first_key, seen_[row]) << "keys once, and none left out";
        const int32_t keys = std::min(item.keys, of_item + 1 + item.keys - item.rows);
        ASSERT_GT(keys, 0);
        seen_[row] += keys;
        ASSERT_LE(seen_[row], position + 1);
        if (tile.chunk_keys == 0)
          continue;
        for (int32_t head = 0; head < group(); ++head) {
          const int64_t at = partial_row_of(tile, e, head, group());
          ASSERT_TRUE(all.insert(at).second);
          written[{row, head}].insert(at);
        }
      }
    }
  }

  void expect_merges_read(const std::vector<AttentionTile>& merges, const AttentionRows& rows,
                          Partials& written, int32_t partial_rows) {
    for (const AttentionTile& tile : merges) {
      const int32_t end = std::min(tile.entry + kAttentionEntries, tile.entries);
      for (int32_t entry = tile.entry; entry < end; ++entry) {
        const std::pair key(rows.base + tile.row + entry / group(), entry % group());
        std::set<int64_t> read;
        const int32_t chunks = (tile.position + entry / group()) / tile.chunk_keys + 1;
        for (int32_t chunk = 0; chunk < chunks; ++chunk)
          read.insert(tile.partial + int64_t{chunk} * tile.entries + entry);
        ASSERT_LT(*read.rbegin(), partial_rows);
        ASSERT_EQ(written[key], read);
        written.erase(key);
      }
    }
    ASSERT_TRUE(written.empty()) << "nothing is left unmerged";
  }

  void expect_lists_are_right(const std::vector<AttentionRows>& all_rows) {
    const PlanSizes sizes{
        .rows = batch_.rows(), .tile_rows = batch_.rows(), .sequences = batch_.num_sequences()};
    const PlanShape shape(graph_, sizes, kTableStride, rules(), all_rows);
    ASSERT_LE(shape.inputs.bytes, InputLayout::max_bytes(graph_, sizes, kTableStride, rules()));
    ASSERT_LE(shape.scratch_bytes(), size_t{257} << 20);
    const std::vector<std::byte> bytes = batch_inputs(shape, batch_, {});
    ASSERT_EQ(bytes.size(), shape.inputs.bytes);
    seen_.clear();
    for (size_t i = 0; i < all_rows.size(); ++i) {
      const AttentionLaunches& launches = shape.inputs.attention[i];
      for (const AttentionLists& lists : launches.row_lists) {
        auto tiles = list(bytes, lists.tiles, lists.num_tiles);
        std::ranges::stable_sort(tiles, {}, &AttentionTile::chunk);
        Partials written;
        ASSERT_NO_FATAL_FAILURE(expect_tiles_are_right(tiles, all_rows[i], written));
        ASSERT_NO_FATAL_FAILURE(expect_merges_read(list(bytes, lists.merges, lists.num_merges),
                                                   all_rows[i], written,
                                                   launches.row_partial_rows));
        ASSERT_LE(attention_partial_bytes(launches.row_partial_rows, graph_.attention.kv_heads,
                                          graph_.attention.head_dim),
                  shape.scratch_bytes());
      }
      num_launches_ = std::max(num_launches_, launches.row_lists.size());
    }
    for (const Sequence& s : batch_.sequences) {
      for (int32_t row = 0; rules().is_for_hopper(s.rows) && row < s.rows; ++row)
        ASSERT_EQ(seen_[s.row_begin + row], s.context + row + 1);
    }
  }

  ModelGraph graph_;
  Batch batch_;
  std::mt19937 random_{9};
  std::map<int32_t, int32_t> seen_;  // keys, by row of the batch
  size_t num_launches_ = 0;
};

TEST_F(AttentionListsTest, every_row_sees_every_key_once_however_rows_are_cut) {
  for (int round = 0; round < kRounds; ++round) {
    set_model(kModels[random(std::size(kModels))]);
    make_batch();
    for (const bool is_windowed : {false, true})
      ASSERT_NO_FATAL_FAILURE(expect_lists_are_right(cut_anywhere(is_windowed)));
  }
  EXPECT_GT(num_launches_, 1u) << "some batches have more partial results than a launch has room";
}

TEST_F(AttentionListsTest, up_to_32k_tokens_there_is_one_list_as_without_chunks) {
  set_model(kModels[0]);
  add_sequence(4096, 28672);
  const PlanSizes sizes{.rows = 4096, .tile_rows = 4096, .sequences = 1};
  const PlanShape shape(graph_, sizes, 512, rules(), {{0, 4096, 0}});
  ASSERT_EQ(shape.inputs.attention[0].row_lists.size(), 1u);
  const AttentionLists& lists = shape.inputs.attention[0].row_lists[0];
  EXPECT_EQ(lists.num_tiles, max_attention_row_tiles(4096, 1, 128));
  EXPECT_EQ(lists.num_merges, 0);
  EXPECT_EQ(rules().chunked_rows(4096, 512), 0);
  EXPECT_EQ(rules().chunked_rows(4096, 513), 3840) << "a block more";
  const Operator windowed = *std::ranges::find_if(graph_.operators, [](const Operator& op) {
    return op.kind == OperatorKind::kAttention && op.window > 0;
  });
  EXPECT_FALSE(rules().rows_of({}, windowed, 512).is_windowed) << "lists are shared";
  EXPECT_TRUE(rules().rows_of({}, windowed, 513).is_windowed);
}

// The scratch is that of the largest plan: shorter block tables may leave room for more rows.
TEST_F(AttentionListsTest, scratch_of_the_largest_plan_is_enough_for_all) {
  for (const Heads& heads : kModels) {
    set_model(heads);
    for (const int32_t most : {513, 1500, 2048, 4096, 16384}) {
      const size_t scratch = rules().most_scratch_bytes_of(200000, most);
      EXPECT_TRUE(scratch <= size_t{256} << 20 || most > 4096) << "one tile of rows may need more";
      for (int32_t stride = 500; stride <= most; stride += 37) {
        for (const int32_t rows : {1, 2048, 100000, 200000}) {
          const int32_t of_launch = rules().chunked_rows(rows, stride);
          ASSERT_LE(rules().scratch_bytes_of(of_launch, stride), scratch) << stride;
        }
      }
    }
    EXPECT_EQ(rules().most_scratch_bytes_of(200000, 512), 0u);
  }
}

// 128 rows at 120k tokens: a block of threads for 128 of 132 multiprocessors, of nearly equal work.
TEST_F(AttentionListsTest, one_tile_of_rows_of_all_heads_fills_the_device) {
  set_model(kModels[0]);
  const auto parts =
      row_slices({.row = 0, .rows = 128, .position = 122880, .sequence = 0}, rules().chunks);
  ASSERT_EQ(parts.size(), 1u);
  const std::vector<AttentionTile> tiles = attention_row_tiles(parts, 128);
  ASSERT_EQ(tiles.size(), 4u);
  for (const AttentionTile& tile : tiles) {
    const AttentionItem item = item_of_tile(tile, 128);
    EXPECT_LE(item.keys, parts[0].chunk_keys);
    EXPECT_GE(item.keys, parts[0].chunk_keys - 2048);
  }
}

}  // namespace
}  // namespace flowprefill::testing
