// Attention of many rows by Hopper's kernel, on the device: against plain loops in double, and what
// must hold to the bit; whole and over chunks of keys.
#include "attention_fixture.h"
#include "devices/cuda/backend/batch_inputs.h"

namespace flowprefill::testing {
namespace {

TEST_F(HopperAttention, OfManyRows) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const auto& [block_shift, window, softcap] :
         {std::tuple{4, 0, 0.0f}, {6, 150, 0.0f}, {5, 0, 3.0f}, {7, 90, 3.0f}, {6, 0, 0.0f}}) {
      make_rows({.heads = 6,
                 .kv_heads = 2,
                 .head_dim = head_dim,
                 .block_shift = block_shift,
                 .window = window,
                 .softcap = softcap,
                 .parts = {{0, 300}, {70, 129}, {131, 140}}});
      expect_rows_are_plain();
    }
  }
}

// Contexts that end with a block, with a tile, and with one key in either.
TEST_F(HopperAttention, AroundBlocksAndTiles) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t block_shift : {3, 6, 7}) {
      make_rows({.head_dim = head_dim,
                 .block_shift = block_shift,
                 .parts = {{0, 128}, {128, 128}, {1, 128}, {127, 128}, {63, 130}, {0, 1}}});
      expect_rows_are_plain();
    }
  }
}

TEST_F(HopperAttention, OfSomeKvHeads) {
  make_rows({.heads = 6, .kv_heads = 3, .head_dim = 128, .block_shift = 6, .parts = {{70, 200}}});
  std::tie(kv_begin_, kv_end_) = std::pair{1, 2};
  expect_rows_are_plain();
}

TEST_F(HopperAttention, OfALongContext) {
  const int32_t context = kIsDouble ? 900 : 9000;
  for (const int32_t window : {0, 700}) {
    make_rows({.heads = 4,
               .kv_heads = 2,
               .head_dim = 128,
               .block_shift = 6,
               .window = window,
               .parts = {{context, 133}, {context + 59, 70}}});
    expect_rows_are_plain();
  }
}

// A graph keeps what describes the cache: tables and tiles are read at each replay.
TEST_F(HopperAttention, AGraphReadsTablesAndTilesAtEachReplay) {
  make_rows({.heads = 4, .kv_heads = 2, .head_dim = 128, .parts = {{20, 130}, {0, 150}}});
  const std::vector<AttentionTile> both = attention_row_tiles(slices_, 128);
  std::vector<AttentionTile> first = attention_row_tiles(std::span(slices_).first(1), 128);
  first.resize(both.size());
  set_tiles(attention_tiles(slices_, group()), slices_);
  out_->allow(kAllowed, 1e-6, scale());
  set_tiles(both, slices_);
  const auto launch = [&](cudaStream_t s) {
    return launch_attention_hopper(args_of_heads(Place::kDevice), s);
  };
  const auto plain = [&] { fake_kernels::attention_of_rows(args_of_heads(Place::kHost)); };
  expect_kernel(launch, plain);
  expect_after_change(launch, plain, [&] { tiles_->initial() = first; });
}

// Neither slices, nor neighbours, nor the KV heads computed with it change a row's bits.
TEST_F(HopperAttention, RowsDoNotDependOnSlicesOrBatch) {
  for (const int32_t window : {0, 150}) {
    make_rows({.heads = 4,
               .kv_heads = 2,
               .head_dim = 128,
               .block_shift = 6,
               .window = window,
               .parts = {{237, 390}, {0, 150}}});
    std::tie(kv_begin_, kv_end_) = std::pair{0, 0};
    const std::vector<Bf16> want = bits_of_rows(slices_);
    for (const auto& [begin, end, head] :
         {std::tuple{0, 13, 0}, {13, 14, 1}, {14, 147, 0}, {147, 390, 1}}) {
      std::tie(kv_begin_, kv_end_) = std::pair{head, head + 1};
      const std::vector<AttentionSlice> slice = {{begin, end - begin, 237 + begin, 0}};
      const std::vector<Bf16> got = bits_of_rows(slice);
      const int64_t width = ld() / 2;
      for (int64_t row = begin; row < end; ++row) {
        const auto at = static_cast<std::ptrdiff_t>(row * ld() + head * width);
        ASSERT_TRUE(std::equal(got.begin() + at, got.begin() + at + width, want.begin() + at))
            << "row " << row << ", KV head " << head << ", window " << window;
      }
    }
  }
}

// ---- over chunks of keys

// Small ones: rows from 256 on have three chunks of 128 keys, or of 256, or of 384.
constexpr KeyChunks kChunks{.from = 256, .rows = 128, .most_keys = 1024, .step = 128, .count = 3};

class HopperChunks : public HopperAttention {
 protected:
  static std::vector<AttentionSlice> parted(std::span<const AttentionSlice> slices,
                                            const KeyChunks& chunks = kChunks) {
    std::vector<AttentionSlice> all;
    for (const AttentionSlice& slice : slices) {
      const std::vector<AttentionSlice> parts = row_slices(slice, chunks);
      all.insert(all.end(), parts.begin(), parts.end());
    }
    return all;
  }
  static Shape with_parts(Shape shape, std::vector<Part> parts) {
    shape.parts = std::move(parts);
    return shape;
  }
  void make_parted(const Shape& shape) {
    make_rows(shape);
    slices_ = parted(slices_);
  }
};

TEST_F(HopperChunks, OfManyRows) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const auto& [block_shift, softcap] : {std::tuple{4, 0.0f}, {6, 3.0f}, {7, 0.0f}}) {
      const Shape shape{.heads = 6,
                        .kv_heads = 2,
                        .head_dim = head_dim,
                        .block_shift = block_shift,
                        .softcap = softcap};
      make_parted(with_parts(shape, {{200, 100}, {390, 140}, {127, 128}, {513, 1}}));
      expect_rows_are_plain();
      if (kIsDouble)
        continue;  // too slow
      make_parted(with_parts(shape, {{0, 500}, {1500, 40}}));
      expect_rows_are_plain();
    }
  }
}

TEST_F(HopperChunks, OfSomeKvHeads) {
  make_parted(
      {.heads = 6, .kv_heads = 3, .head_dim = 128, .block_shift = 6, .parts = {{500, 200}}});
  std::tie(kv_begin_, kv_end_) = std::pair{1, 2};
  expect_rows_are_plain();
}

// Neither slices, nor neighbours, nor the KV heads computed with it change a row's bits; rows
// before the first chunk have those of a launch without chunks.
TEST_F(HopperChunks, RowsDoNotDependOnSlicesOrBatch) {
  for (const int32_t head_dim : {64, 128, 256}) {
    make_rows({.heads = 4,
               .kv_heads = 2,
               .head_dim = head_dim,
               .block_shift = 6,
               .parts = {{137, 690}, {301, 150}}});
    std::tie(kv_begin_, kv_end_) = std::pair{0, 0};
    const std::vector<Bf16> whole = bits_of_rows(slices_);
    const std::vector<Bf16> want = bits_of_rows(parted(slices_));
    const auto width = static_cast<std::ptrdiff_t>(ld() / 2);
    for (const auto& [begin, end, head] :
         {std::tuple{0, 13, 0}, {13, 14, 1}, {14, 247, 0}, {247, 390, 1}, {390, 690, 0}}) {
      std::tie(kv_begin_, kv_end_) = std::pair{head, head + 1};
      const std::vector<AttentionSlice> slice = {{begin, end - begin, 137 + begin, 0}};
      const std::vector<Bf16> got = bits_of_rows(parted(slice));
      for (int64_t row = begin; row < end; ++row) {
        const auto at = static_cast<std::ptrdiff_t>(row * ld()) + head * width;
        ASSERT_TRUE(std::equal(got.begin() + at, got.begin() + at + width, want.begin() + at))
            << "row " << row << ", KV head " << head << ", head size " << head_dim;
        ASSERT_TRUE(row >= kChunks.from - 137 ||
                    std::equal(got.begin() + at, got.begin() + at + width, whole.begin() + at))
            << "row " << row << " has no chunks";
      }
    }
  }
}

// A graph has room for chunks; a run may have others, fewer or none.
TEST_F(HopperChunks, AGraphReadsListsAtEachReplay) {
  make_rows({.heads = 4, .kv_heads = 2, .head_dim = 128, .parts = {{290, 230}, {0, 150}}});
  const std::vector<AttentionSlice> both = parted(slices_);
  for (const size_t sequence : {size_t{0}, size_t{1}}) {
    const std::vector<AttentionSlice> one = parted(std::span(slices_).subspan(sequence, 1));
    std::vector<AttentionTile> tiles = attention_row_tiles(one, 128);
    std::vector<AttentionTile> merges = attention_merges(attention_tiles(one, group()));
    set_tiles(attention_tiles(slices_, group()), slices_);
    out_->allow(kAllowed, 1e-6, scale());
    set_row_tiles(both);
    tiles.resize(tiles_->initial().size());
    merges.resize(device_merges_->initial().size());
    const auto launch = [&](cudaStream_t s) {
      return launch_attention_hopper(args_of_heads(Place::kDevice), s);
    };
    const auto plain = [&] { fake_kernels::attention_of_rows(args_of_heads(Place::kHost)); };
    expect_kernel(launch, plain);
    expect_after_change(launch, plain, [&] {
      tiles_->initial() = tiles;
      device_merges_->initial() = merges;
    });
  }
}

// As the backend parts them: four chunks of 10k keys, against the portable kernel. Plain loops over
// so many keys would take half a minute.
TEST_F(HopperChunks, OfALargeContext) {
  const int32_t context = kIsDouble ? 700 : 40000;
  const KeyChunks chunks = kIsDouble ? kChunks : KeyChunks::of(32, 132);
  for (const auto& [head_dim, softcap] :
       {std::tuple{64, 0.0f}, {128, 0.0f}, {128, 3.0f}, {256, 0.0f}}) {
    make_rows({.heads = kIsDouble ? 2 : 8,
               .head_dim = head_dim,
               .block_shift = 6,
               .softcap = softcap,
               .parts = {{context, kIsDouble ? 130 : 300}}});
    const std::vector<Bf16> want = bits_of(slices_);
    const std::vector<AttentionSlice> parts = parted(slices_, chunks);
    ASSERT_GT(parts.front().chunk_keys, 0);
    const std::vector<Bf16> got = bits_of_rows(parts);
    float largest = 0, worst = 0;
    for (size_t i = 0; i < static_cast<size_t>(rows_ * ld()); ++i) {
      ASSERT_FALSE(std::isnan(widen(got[i]))) << i;
      largest = std::max(largest, std::abs(widen(want[i])));
      worst = std::max(worst, std::abs(widen(want[i]) - widen(got[i])));
    }
    EXPECT_LE(worst, 0.02f * largest) << "head size " << head_dim << ", cap " << softcap;
  }
}

}  // namespace
}  // namespace flowprefill::testing
