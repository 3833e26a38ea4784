// Ragged causal attention over the paged cache, on the device: against plain loops in double, and
// what must hold to the bit.
#include "attention_fixture.h"

namespace flowprefill::testing {
namespace {

TEST_F(Attention, OfRaggedBatchesInEveryHeadSize) {
  for (const int32_t head_dim : {64, 96, 128, 256}) {
    make({.heads = 6, .kv_heads = 2, .head_dim = head_dim, .parts = {{0, 45}, {70, 1}, {13, 20}}});
    expect_is_plain();
  }
}

TEST_F(Attention, WithOneKvHeadAndWithAsManyAsHeads) {
  for (const int32_t kv_heads : {1, 3}) {
    make({.heads = 3, .kv_heads = kv_heads, .block_shift = 0, .parts = {{31, 40}}});
    expect_is_plain();
  }
}

TEST_F(Attention, WithinAWindow) {
  for (const int32_t window : {1, 17, 64, 90}) {
    make({.window = window, .parts = {{60, 70}, {0, 9}}});
    expect_is_plain();
  }
}

TEST_F(Attention, OfCappedScores) {
  for (const int32_t head_dim : {64, 128, 256}) {
    make({.head_dim = head_dim, .window = 50, .softcap = 3.0f, .parts = {{60, 70}, {0, 9}}});
    expect_is_plain();
  }
}

TEST_F(Attention, AroundTheTileSizes) {
  for (const int32_t rows : {1, 63, 64, 65}) {
    make({.heads = 1, .block_shift = 7, .parts = {{0, rows}, {128 - rows, rows}}});
    expect_is_plain();
    make({.heads = 1, .head_dim = 256, .parts = {{0, rows}, {31, rows}}});
    expect_is_plain();
  }
}

// Preemption and batching must not change a row's bits.
TEST_F(Attention, RowsDoNotDependOnSlicesOrBatch) {
  for (const int32_t window : {0, 50}) {
    make({.heads = 3, .window = window, .parts = {{37, 90}, {0, 11}}});
    const std::vector<Bf16> want = bits_of(slices_);
    for (const auto& [begin, end] : {std::pair{0, 13}, {13, 14}, {14, 78}, {78, 90}}) {
      const std::vector<AttentionSlice> slice = {{begin, end - begin, 37 + begin, 0}};
      const std::vector<Bf16> got = bits_of(slice);
      EXPECT_TRUE(std::equal(got.begin() + begin * ld(), got.begin() + end * ld(),
                             want.begin() + begin * ld()))
          << "rows " << begin << " to " << end << ", window " << window;
    }
  }
}

// A graph's tile list is padded with zeros, which touch nothing.
TEST_F(Attention, PaddingTilesWriteNothing) {
  make({.parts = {{0, 5}}});
  std::vector<AttentionTile> tiles = attention_tiles(slices_, group());
  tiles.resize(tiles.size() + 3);
  set_tiles(std::move(tiles), slices_);
  out_->allow(kAllowed, 1e-6, scale());
  expect_kernel([&](cudaStream_t s) { return launch_attention(args(Place::kDevice), s); },
                [&] { fake_kernels::attention(args(Place::kHost)); });
}

// A graph keeps addresses: another batch of the same bucket gives its tiles and tables there.
TEST_F(Attention, AGraphReadsTablesAndTilesAtEachReplay) {
  make({.heads = 4, .kv_heads = 2, .parts = {{20, 30}, {0, 30}}});
  const std::vector<AttentionTile> both = attention_tiles(slices_, group());
  std::vector<AttentionTile> first = attention_tiles(std::span(slices_).first(1), group());
  first.resize(both.size());
  set_tiles(both, slices_);
  out_->allow(kAllowed, 1e-6, scale());
  const auto launch = [&](cudaStream_t s) { return launch_attention(args(Place::kDevice), s); };
  const auto plain = [&] { fake_kernels::attention(args(Place::kHost)); };
  expect_kernel(launch, plain);
  expect_after_change(launch, plain, [&] { tiles_->initial() = first; });
}

// Flash-decoding: some sequences split, one not.
TEST_F(Attention, OverSplitKeys) {
  for (const int32_t head_dim : {64, 96, 128, 256}) {
    for (const int32_t window : {0, 150}) {
      make({.heads = 6,
            .kv_heads = 2,
            .head_dim = head_dim,
            .window = window,
            .softcap = window > 0 ? 3.0f : 0.0f,
            .parts = {{400, 1}, {13, 20}, {290, 25}}});
      slices_[0].chunk_keys = 64;
      slices_[2].chunk_keys = 128;
      expect_is_plain();
    }
  }
}

// Around a warp's 16 keys, a block's 64, what the buffers hold, and windows that start within; a
// table that ends with the last key; split and not; next to a sequence that does not decode.
TEST_F(Attention, OfDecodingSequences) {
  for (const int32_t head_dim : {64, 96, 128, 256}) {
    for (const auto& [block_shift, window] : {std::pair{4, 0}, {2, 90}, {6, 30}}) {
      make({.heads = 8,
            .kv_heads = 2,
            .head_dim = head_dim,
            .block_shift = block_shift,
            .window = window,
            .softcap = window == 30 ? 3.0f : 0.0f,
            .parts = {{0, 1}, {15, 1}, {47, 2}, {127, 1}, {13, 20}, {60, 4}, {400, 1}, {319, 1}}});
      for (AttentionSlice& slice : slices_)
        slice.is_decode = slice.rows <= 4;
      slices_[5].chunk_keys = 64;
      slices_[6].chunk_keys = 192;
      slices_[7].chunk_keys = 128;
      expect_is_plain();
    }
  }
}

TEST_F(Attention, OfDecodingSequencesRowsDoNotDependOnSlicesOrBatch) {
  make({.heads = 6, .kv_heads = 2, .head_dim = 128, .parts = {{437, 5}, {0, 11}, {300, 1}}});
  slices_[0].is_decode = slices_[2].is_decode = true;
  slices_[0].chunk_keys = 192;
  const std::vector<Bf16> want = bits_of(slices_);
  for (const auto& [begin, end] : {std::pair{0, 2}, {2, 3}, {3, 5}}) {
    const std::vector<AttentionSlice> slice = {{begin, end - begin, 437 + begin, 0, 192, true}};
    const std::vector<Bf16> got = bits_of(slice);
    EXPECT_TRUE(std::equal(got.begin() + begin * ld(), got.begin() + end * ld(),
                           want.begin() + begin * ld()))
        << "rows " << begin << " to " << end;
  }
  const std::vector<Bf16> alone = bits_of(std::span(slices_).subspan(2));
  EXPECT_TRUE(
      std::equal(alone.begin() + 16 * ld(), alone.begin() + 17 * ld(), want.begin() + 16 * ld()));
}

TEST_F(Attention, OverSplitKeysRowsDoNotDependOnSlicesOrBatch) {
  make({.heads = 3, .window = 200, .parts = {{237, 90}, {0, 11}}});
  slices_[0].chunk_keys = 64;
  const std::vector<Bf16> want = bits_of(slices_);
  for (const auto& [begin, end] : {std::pair{0, 13}, {13, 14}, {14, 78}, {78, 90}}) {
    const std::vector<AttentionSlice> slice = {{begin, end - begin, 237 + begin, 0, 64}};
    const std::vector<Bf16> got = bits_of(slice);
    EXPECT_TRUE(std::equal(got.begin() + begin * ld(), got.begin() + end * ld(),
                           want.begin() + begin * ld()))
        << "rows " << begin << " to " << end;
  }
}

// As the backend splits them.
TEST_F(Attention, OfOneRowOnALongContext) {
  const int32_t context = kIsDouble ? 900 : 32767;
  make({.heads = 8, .kv_heads = 2, .head_dim = 128, .parts = {{context, 1}}});
  const AttentionSplit split{132, 4, 2};
  slices_[0].chunk_keys = split.chunk_keys(1, context + 1);
  slices_[0].is_decode = split.is_decode(1);
  ASSERT_GT(slices_[0].chunk_keys, 0);
  ASSERT_TRUE(slices_[0].is_decode);
  expect_is_plain();
}

// A context that spans many tiles of keys.
TEST_F(Attention, OfALongContext) {
  const int32_t context = kIsDouble ? 700 : 9000;
  make({.heads = 3, .parts = {{context, 33}}});
  expect_is_plain();
}

}  // namespace
}  // namespace flowprefill::testing
