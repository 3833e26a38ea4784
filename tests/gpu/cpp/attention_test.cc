// Ragged causal attention over the paged cache, on the device: against plain loops in double, and
// what must hold to the bit.
#include <algorithm>
#include <span>
#include <tuple>

#include "device_test.h"
#include "devices/cuda/kernels/attention_split.h"

namespace flowprefill::testing {
namespace {

struct Part {
  int32_t context;
  int32_t rows;
};

struct Shape {
  int32_t heads = 2;
  int32_t kv_heads = 1;
  int32_t head_dim = 64;
  int32_t block_shift = 4;
  int32_t window = 0;
  float softcap = 0;
  std::vector<Part> parts = {};
};

// A probability is rounded once to bf16, both results once each: shares of the sum of p |v|.
constexpr double kAllowed = 3 * kBf16Rounding + 1e-5;

class Attention : public DeviceTest {
 protected:
  void make(const Shape& shape) {
    forget();
    shape_ = shape;
    slices_.clear();
    rows_ = 0;
    const int32_t block_tokens = 1 << shape.block_shift;
    table_stride_ = 1;
    for (const Part& part : shape.parts) {
      const auto sequence = static_cast<int32_t>(slices_.size());
      slices_.push_back(
          {.row = rows_, .rows = part.rows, .position = part.context, .sequence = sequence});
      rows_ += part.rows;
      table_stride_ =
          std::max(table_stride_, (part.context + part.rows + block_tokens - 1) / block_tokens);
    }
    head_stride_ = int64_t{shape.head_dim} << shape.block_shift;
    block_stride_ = head_stride_ * shape.kv_heads;
    const int32_t blocks = table_stride_ * static_cast<int32_t>(slices_.size());
    const auto slots = static_cast<size_t>(blocks * block_stride_);
    tables_ = &add("block_tables", permutation(blocks));
    q_ = &add("q", halves(static_cast<size_t>(rows_ * ld()), 0.5f));
    // Slots that hold no token are NaN: reading one spoils the result.
    keys_ = &add("keys", filled_halves(slots));
    values_ = &add("values", filled_halves(slots));
    for (size_t i = 0; i < slices_.size(); ++i)
      fill(slices_[i]);
    out_ = &add("out", filled_halves(static_cast<size_t>((rows_ + 1) * ld())));
    tiles_ = nullptr;
  }

  int64_t ld() const { return int64_t{shape_.heads} * shape_.head_dim; }
  int32_t group() const { return shape_.heads / shape_.kv_heads; }
  CacheView cache(Place p) {
    return {keys_->at(p),    values_->at(p), block_stride_,
            shape_.head_dim, head_stride_,   shape_.block_shift};
  }

  void fill(const AttentionSlice& slice) {
    const int32_t* table = tables_->initial().data() + slice.sequence * table_stride_;
    const CacheView view = cache(Place::kHost);
    for (int32_t position = 0; position < slice.position + slice.rows; ++position) {
      for (int32_t head = 0; head < shape_.kv_heads; ++head) {
        const int64_t at = view.offset(table, position) + head * head_stride_;
        std::ranges::copy(halves(static_cast<size_t>(shape_.head_dim)),
                          keys_->initial().begin() + at);
        std::ranges::copy(halves(static_cast<size_t>(shape_.head_dim)),
                          values_->initial().begin() + at);
      }
    }
  }

  void set_tiles(std::vector<AttentionTile> tiles) {
    merges_ = attention_merges(tiles);
    partial_rows_ = 0;
    for (const AttentionTile& tile : tiles) {
      if (tile.chunk_keys > 0)
        partial_rows_ = std::max(partial_rows_, tile.partial + (tile.chunk + 1) * tile.entries);
    }
    tiles_ = &add("tiles", std::move(tiles));
    if (merges_.empty())
      return;
    device_merges_ = &add("merges", merges_);
    partials_ =
        DeviceBuffer(attention_partial_bytes(partial_rows_, shape_.kv_heads, shape_.head_dim));
  }

  AttentionArgs args(Place p) {
    return {.q = q_->at(p),
            .ld_q = ld(),
            .out = out_->at(p),
            .ld_out = ld(),
            .cache = cache(p),
            .block_tables = tables_->at(p),
            .block_table_stride = table_stride_,
            .tiles = tiles_->at(p),
            .num_tiles = static_cast<int32_t>(tiles_->initial().size()),
            .rows = rows_,
            .merges = merges_.empty() ? nullptr : device_merges_->at(p),
            .num_merges = static_cast<int32_t>(merges_.size()),
            .num_blocks = 7,  // so that some take several tiles
            .partials = reinterpret_cast<float*>(partials_.get()),
            .partial_rows = partial_rows_,
            .heads = shape_.heads,
            .kv_heads = shape_.kv_heads,
            .kv_end = shape_.kv_heads,
            .head_dim = shape_.head_dim,
            .window = shape_.window,
            .softcap = shape_.softcap};
  }

  // Sums of p |v|: what an output's error is a share of.
  std::vector<double> scale() {
    keys_->host() = keys_->initial();
    q_->host() = q_->initial();
    tables_->host() = tables_->initial();
    tiles_->host() = tiles_->initial();
    out_->host() = out_->initial();
    values_->host() = values_->initial();
    for (Bf16& value : values_->host())
      value &= 0x7fff;
    fake_kernels::attention(args(Place::kHost));
    std::vector<double> out;
    for (const Bf16 value : out_->host())
      out.push_back(widen(value));
    return out;
  }

  void expect_is_plain() {
    set_tiles(attention_tiles(slices_, group()));
    out_->allow(kAllowed, 1e-6, scale());
    expect_kernel([&](cudaStream_t s) { return launch_attention(args(Place::kDevice), s); },
                  [&] { fake_kernels::attention(args(Place::kHost)); });
  }

  // The output's bits after only these slices were computed.
  std::vector<Bf16> bits_of(std::span<const AttentionSlice> slices) {
    set_tiles(attention_tiles(slices, group()));
    const auto fetched =
        run([&](cudaStream_t s) { return launch_attention(args(Place::kDevice), s); });
    std::vector<Bf16> out(out_->initial().size());
    std::memcpy(out.data(), fetched[4].data(), fetched[4].size());
    return out;
  }

  Shape shape_;
  std::vector<AttentionSlice> slices_;
  int32_t rows_ = 0;
  int32_t table_stride_ = 1;
  int64_t head_stride_ = 0;
  int64_t block_stride_ = 0;
  Array<int32_t>* tables_ = nullptr;
  Array<Bf16>* q_ = nullptr;
  Array<Bf16>* keys_ = nullptr;
  Array<Bf16>* values_ = nullptr;
  Array<Bf16>* out_ = nullptr;  // the fifth operand
  Array<AttentionTile>* tiles_ = nullptr;
  std::vector<AttentionTile> merges_;
  Array<AttentionTile>* device_merges_ = nullptr;
  DeviceBuffer partials_{0};
  int32_t partial_rows_ = 0;
};

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
  set_tiles(std::move(tiles));
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
  set_tiles(both);
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

// Hopper's kernel, where the device and the build have it: against the same plain loops.
class HopperAttention : public Attention {
 protected:
  void SetUp() override {
    Attention::SetUp();
    if (!IsSkipped() && !kIsDouble && (gpu_.compute_capability != 90 || !has_hopper_attention()))
      GTEST_SKIP() << "compute capability 9.0 and a build with FlashInfer's headers are needed";
  }

  void make_rows(const Shape& shape) {
    make(shape);
    // Entries beyond a sequence's blocks are no block's number: reading a block by one fails.
    for (const AttentionSlice& slice : slices_) {
      const int32_t used = ((slice.position + slice.rows - 1) >> shape.block_shift) + 1;
      const auto table = tables_->initial().begin() + slice.sequence * table_stride_;
      std::fill(table + used, table + table_stride_, INT32_MAX);
    }
  }

  AttentionArgs args_of_heads(Place p) {
    AttentionArgs out = args(p);
    out.kv_begin = kv_begin_;
    out.kv_end = kv_end_ > 0 ? kv_end_ : shape_.kv_heads;
    return out;
  }

  void expect_rows_are_plain() {
    set_tiles(attention_tiles(slices_, group()));
    out_->allow(kAllowed, 1e-6, scale());
    std::vector<AttentionTile> tiles = attention_row_tiles(slices_, shape_.head_dim);
    tiles.resize(tiles.size() + 3);
    set_tiles(std::move(tiles));
    expect_kernel(
        [&](cudaStream_t s) { return launch_attention_hopper(args_of_heads(Place::kDevice), s); },
        [&] { fake_kernels::attention_of_rows(args_of_heads(Place::kHost)); });
  }

  std::vector<Bf16> bits_of_rows(std::span<const AttentionSlice> slices) {
    set_tiles(attention_row_tiles(slices, shape_.head_dim));
    const auto fetched = run(
        [&](cudaStream_t s) { return launch_attention_hopper(args_of_heads(Place::kDevice), s); });
    std::vector<Bf16> out(out_->initial().size());
    std::memcpy(out.data(), fetched[4].data(), fetched[4].size());
    return out;
  }

  int32_t kv_begin_ = 0;
  int32_t kv_end_ = 0;
};

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
  set_tiles(attention_tiles(slices_, group()));
  out_->allow(kAllowed, 1e-6, scale());
  set_tiles(both);
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

// A context that spans many tiles of keys.
TEST_F(Attention, OfALongContext) {
  const int32_t context = kIsDouble ? 700 : 9000;
  make({.heads = 3, .parts = {{context, 33}}});
  expect_is_plain();
}

}  // namespace
}  // namespace flowprefill::testing
