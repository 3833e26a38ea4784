// The attention kernel's body, run thread by thread, against ATen's scaled_dot_product_attention:
// ragged batches, paged cache, grouped heads, windows, capped scores, split keys; and what must
// hold to the bit.
#include <ATen/ops/arange.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include "attention_on_host.h"
#include "devices/cuda/kernels/attention_split.h"
#include "tensors.h"

namespace flowprefill {
namespace {

constexpr double kLn2 = 0.693147180559945309417;

struct Shape {
  int32_t heads = 2;
  int32_t kv_heads = 1;
  int32_t head_dim = 64;
  int32_t block_shift = 4;
  int32_t window = 0;
  float softcap = 0;
  struct Sequence {
    int32_t context, rows;
  };
  std::vector<Sequence> sequences;
};

// A batch with its cache. Slots that belong to no token are NaN: reading one spoils the result.
struct Case {
  Shape shape;
  at::Tensor q, keys, values;
  std::vector<at::Tensor> key_of, value_of;  // per sequence [kv_heads, tokens, dim]
  std::vector<int32_t> tables;
  std::vector<AttentionSlice> slices;
  std::vector<bool> new_slots;  // [blocks * kv_heads * tokens of a block]
  int32_t rows = 0;
  int32_t table_stride = 0;

  Case(const Shape& s, Random& random) : shape(s) {
    const int32_t block_tokens = 1 << s.block_shift;
    for (const auto& sequence : s.sequences) {
      slices.push_back(
          {rows, sequence.rows, sequence.context, static_cast<int32_t>(slices.size())});
      rows += sequence.rows;
      table_stride = std::max(table_stride, (sequence.context + sequence.rows) / block_tokens + 1);
    }
    const auto count = static_cast<int32_t>(s.sequences.size());
    tables = random.permutation(table_stride * count);
    keys = nan_filled({table_stride * count, s.kv_heads, block_tokens, s.head_dim}, at::kBFloat16);
    values = keys.clone();
    new_slots.resize(static_cast<size_t>(keys.numel() / s.head_dim));
    q = random.halves({rows, s.heads, s.head_dim}, 0.5);
    for (int32_t i = 0; i < count; ++i)
      fill(i, random);
  }

  void fill(int32_t sequence, Random& random) {
    const auto& s = shape.sequences[static_cast<size_t>(sequence)];
    const int32_t tokens = s.context + s.rows;
    key_of.push_back(random.halves({shape.kv_heads, tokens, shape.head_dim}));
    value_of.push_back(random.halves({shape.kv_heads, tokens, shape.head_dim}));
    place(keys, sequence, key_of.back());
    place(values, sequence, value_of.back());
    for (int32_t t = s.context; t < tokens; ++t) {
      for (int32_t head = 0; head < shape.kv_heads; ++head) {
        const int32_t of_head = block_of(sequence, t) * shape.kv_heads + head;
        new_slots[static_cast<size_t>((of_head << shape.block_shift) + slot_of(t))] = true;
      }
    }
  }
  int32_t block_of(int32_t sequence, int32_t token) const {
    return tables[static_cast<size_t>(sequence * table_stride + (token >> shape.block_shift))];
  }
  int32_t slot_of(int32_t token) const { return token % (1 << shape.block_shift); }

  // Puts a sequence's keys or values [kv_heads, tokens, dim] into the blocks of its table.
  void place(const at::Tensor& cache, int32_t sequence, const at::Tensor& tokens) const {
    for (int32_t t = 0; t < tokens.size(1); ++t)
      cache[block_of(sequence, t)].select(1, slot_of(t)).copy_(tokens.select(1, t));
  }

  AttentionArgs args(const std::vector<AttentionTile>& tiles, const at::Tensor& out) const {
    const int64_t token = shape.head_dim;
    const int64_t head = token << shape.block_shift;
    const int64_t ld = int64_t{shape.heads} * shape.head_dim;
    return {
        .q = bits(q),
        .ld_q = ld,
        .out = bits(out),
        .ld_out = ld,
        .cache = {bits(keys), bits(values), head * shape.kv_heads, token, head, shape.block_shift},
        .block_tables = tables.data(),
        .block_table_stride = table_stride,
        .tiles = tiles.data(),
        .num_tiles = static_cast<int32_t>(tiles.size()),
        .heads = shape.heads,
        .kv_heads = shape.kv_heads,
        .kv_end = shape.kv_heads,
        .head_dim = shape.head_dim,
        .window = shape.window,
        .softcap = shape.softcap};
  }

  // Runs the kernel's body over these tiles and KV heads from `kv_begin` to `kv_end` (-1: all);
  // what they leave out stays NaN.
  at::Tensor run(const std::vector<AttentionTile>& tiles, uint32_t seed, int32_t kv_begin = 0,
                 int32_t kv_end = -1) const {
    const at::Tensor out = nan_filled(q.sizes(), at::kBFloat16);
    AttentionArgs a = args(tiles, out);
    a.kv_begin = kv_begin;
    a.kv_end = kv_end < 0 ? a.kv_heads : kv_end;
    const std::vector<AttentionTile> merges = attention_merges(tiles);
    const int64_t partial_rows = partial_rows_in(tiles);
    const int32_t heads = a.kv_end - a.kv_begin;
    const at::Tensor partials = nan_filled(
        {static_cast<int64_t>(attention_partial_bytes(partial_rows, heads, a.head_dim)) / 4 + 4},
        at::kFloat);
    a.merges = merges.data();
    a.num_merges = static_cast<int32_t>(merges.size());
    a.num_blocks = 1 + static_cast<int32_t>(seed % 5);  // fewer than tiles, or more
    a.partials = partials.data_ptr<float>();
    a.partial_rows = static_cast<int32_t>(partial_rows);
    check(a);
    simt::run_attention(a, seed, [&](const void* from) { return is_new(from); });
    EXPECT_EQ(count_finite(partials.slice(0, partials.numel() - 4)), 0) << "written beyond the end";
    return out;
  }

  // Whether keys or values lie there that the run brings: of rows after a sequence's context.
  bool is_new(const void* at) const {
    for (const at::Tensor* cache : {&keys, &values}) {
      const int64_t element = static_cast<const Bf16*>(at) - bits(*cache);
      if (element >= 0 && element < cache->numel())
        return new_slots[static_cast<size_t>(element / shape.head_dim)];
    }
    return false;
  }
  // Rows up to the last that any of the tiles writes.
  static int64_t partial_rows_in(const std::vector<AttentionTile>& tiles) {
    int64_t rows = 0;
    for (const AttentionTile& t : tiles) {
      if (t.chunk_keys > 0)
        rows = std::max(rows, t.partial + int64_t{t.chunk + 1} * t.entries);
    }
    return rows;
  }
  // Splits the keys of sequence `i` into chunks of so many keys.
  void split(size_t i, int32_t chunk_keys) { slices[i].chunk_keys = chunk_keys; }
  // Lets a sequence be computed as one that decodes, where its entries are few enough.
  void decode(size_t i) {
    slices[i].is_decode = slices[i].rows * (shape.heads / shape.kv_heads) <= kDecodeEntries;
  }
  void decode_all() {
    for (size_t i = 0; i < slices.size(); ++i)
      decode(i);
  }
  at::Tensor run(uint32_t seed) const {
    return run(attention_tiles(slices, shape.heads / shape.kv_heads), seed);
  }

  // ATen's answer for one sequence in double, [rows, heads, dim]; `v` [kv_heads, tokens, dim].
  at::Tensor reference(int32_t sequence, const at::Tensor& v) const {
    const AttentionSlice& s = slices[static_cast<size_t>(sequence)];
    const at::Tensor at = at::arange(s.position + s.rows);
    const at::Tensor behind = at.slice(0, s.position).unsqueeze(1) - at.unsqueeze(0);
    at::Tensor mask = behind >= 0;
    if (shape.window > 0)
      mask = mask & (behind < shape.window);
    const int64_t group = shape.heads / shape.kv_heads;
    const at::Tensor k =
        key_of[static_cast<size_t>(sequence)].to(at::kDouble).repeat_interleave(group, 0);
    const at::Tensor query = q.slice(0, s.row, s.row + s.rows).to(at::kDouble).transpose(0, 1);
    const at::Tensor values = v.repeat_interleave(group, 0);
    if (shape.softcap == 0) {
      return at::scaled_dot_product_attention(query, k, values, mask, 0.0, false, kLn2)
          .transpose(0, 1);
    }
    const at::Tensor scores = at::matmul(query, k.transpose(1, 2));
    const at::Tensor capped = at::tanh(scores / shape.softcap) * (shape.softcap * kLn2);
    const at::Tensor seen = capped.masked_fill(mask.logical_not(), -INFINITY);
    return at::matmul(at::softmax(seen, -1), values).transpose(0, 1);
  }
};

void expect_is_atens(const Case& c, const at::Tensor& got) {
  for (size_t i = 0; i < c.slices.size(); ++i) {
    const AttentionSlice& s = c.slices[i];
    const at::Tensor v = c.value_of[i].to(at::kDouble);
    const auto index = static_cast<int32_t>(i);
    // Each probability and the result are rounded once: relative to the sum of p |v|.
    expect_close(got.slice(0, s.row, s.row + s.rows), c.reference(index, v),
                 c.reference(index, v.abs()), 2 * kBf16Rounding + 1e-5, 1e-6);
  }
}

// Without sequences; `which` chooses the head size.
Shape random_heads(Random& random, int32_t kv_heads, int32_t group, uint32_t which,
                   int32_t most_window) {
  return {.heads = kv_heads * group,
          .kv_heads = kv_heads,
          .head_dim = std::vector{64, 96, 128, 256}[which % 4],
          .block_shift = random.integer(0, 7),
          .window = random.coin() ? random.integer(1, most_window) : 0,
          .softcap = random.coin() ? 3.0f : 0.0f,  // so low that it matters
          .sequences = {}};
}

class Attention : public testing::TestWithParam<uint32_t> {};

TEST_P(Attention, IsAtensWithinRoundingOnRandomBatches) {
  Random random(GetParam());
  const int32_t kv_heads = random.integer(1, 2);
  const int32_t group = random.integer(1, 5);
  Shape shape = random_heads(random, kv_heads, group, GetParam(), 150);
  for (int32_t i = random.integer(1, 3); i > 0; --i)
    shape.sequences.push_back({random.integer(0, 140), random.integer(1, 40)});
  const Case c(shape, random);
  expect_is_atens(c, c.run(GetParam()));
}

// Some sequences split, others not, as batches have them.
TEST_P(Attention, OverSplitKeysIsAtensWithinRoundingOnRandomBatches) {
  Random random(100 + GetParam());
  const int32_t kv_heads = random.integer(1, 2);
  const int32_t group = random.integer(1, 5);
  Shape shape = random_heads(random, kv_heads, group, GetParam(), 250);
  for (int32_t i = random.integer(1, 3); i > 0; --i)
    shape.sequences.push_back({random.integer(0, 400), random.integer(1, 20)});
  Case c(shape, random);
  for (size_t i = 0; i < c.slices.size(); ++i)
    c.split(i, i > 0 && random.coin() ? 0 : 64 * random.integer(1, 3));
  expect_is_atens(c, c.run(GetParam()));
}

// Sequences that decode, some with split keys, next to others.
TEST_P(Attention, OfDecodingSequencesIsAtensWithinRoundingOnRandomBatches) {
  Random random(200 + GetParam());
  const int32_t kv_heads = random.integer(1, 2);
  const int32_t group = random.integer(1, 16);
  Shape shape = random_heads(random, kv_heads, group, GetParam(), 250);
  for (int32_t i = random.integer(1, 4); i > 0; --i)
    shape.sequences.push_back(
        {random.integer(0, 400), random.coin() ? random.integer(1, 16 / group) : 17});
  Case c(shape, random);
  c.decode_all();
  for (size_t i = 0; i < c.slices.size(); ++i)
    c.split(i, random.coin() ? 0 : 64 * random.integer(1, 4));
  expect_is_atens(c, c.run(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Seeds, Attention, testing::Range(1u, 17u));

TEST(AttentionEdges, LengthsAroundTheTileSizes) {
  Random random(7);
  for (const int32_t rows : {1, 63, 64, 65, 128}) {
    const Case c({.heads = 1, .sequences = {{0, rows}}}, random);
    expect_is_atens(c, c.run(1));
  }
  for (const int32_t context : {62, 63, 64, 126, 127, 128}) {
    const Case c({.sequences = {{context, 1}}}, random);
    expect_is_atens(c, c.run(1));
  }
  for (const int32_t rows : {31, 32, 33, 65}) {  // tiles of 32 keys
    const Case c({.heads = 1, .head_dim = 256, .sequences = {{0, rows}}}, random);
    expect_is_atens(c, c.run(1));
  }
}

// All scores equal, each value its position: one key too many or too few moves the average by a
// half, far more than rounding. Of a batch of one sequence.
void expect_seen_keys_count_once(Case& c) {
  const Shape& s = c.shape;
  const auto [context, rows] = s.sequences[0];
  c.q.zero_();
  const at::Tensor positions = at::arange(context + rows).view({1, -1, 1});
  c.place(c.values, 0, positions.expand({s.kv_heads, -1, s.head_dim}));
  const at::Tensor last = at::arange(context, context + rows).to(at::kDouble);
  const at::Tensor first = s.window > 0 ? (last - s.window + 1).clamp_min(0) : at::zeros_like(last);
  const at::Tensor want = ((first + last) / 2).view({rows, 1, 1});
  expect_close(c.run(1), want.expand({rows, s.heads, s.head_dim}), kBf16Rounding, 1e-5);
}

TEST(AttentionEdges, EverySeenKeyCountsOnceAndNoOther) {
  Random random(14);
  for (const int32_t window : {0, 5, 64}) {
    for (const int32_t context : {0, 1, 61, 62, 63, 64, 65, 125, 126, 127, 128}) {
      Case c({.heads = 1, .window = window, .sequences = {{context, 3}}}, random);
      expect_seen_keys_count_once(c);
    }
  }
}

// As above: around the 16 keys of a warp, the 64 of a block, the 128 that the buffers hold, and
// windows that start within either. The table ends with the last key: nothing is read behind it.
TEST(AttentionEdges, OfDecodingSequencesEverySeenKeyCountsOnceAndNoOther) {
  Random random(19);
  for (const auto& [dim, block_shift] : {std::pair{64, 4}, {128, 2}, {256, 6}}) {
    for (const int32_t window : {0, 5, 70}) {
      for (const int32_t context : {0, 14, 15, 47, 62, 63, 79, 126, 127, 190, 255, 300}) {
        Case c({.heads = 2,
                .kv_heads = 2,
                .head_dim = dim,
                .block_shift = block_shift,
                .window = window,
                .sequences = {{context, 2}}},
               random);
        c.decode(0);
        if (context % 2 == 1)
          c.split(0, context % 3 == 0 ? 64 : 128);
        c.tables.resize(static_cast<size_t>(((context + 1) >> block_shift) + 1));
        c.tables.shrink_to_fit();
        expect_seen_keys_count_once(c);
      }
    }
  }
}

TEST(AttentionEdges, AWindowOfOneSeesTheRowItself) {
  Random random(8);
  const Case c({.heads = 3, .window = 1, .sequences = {{70, 30}}}, random);
  const at::Tensor own = c.value_of[0].slice(1, 70).transpose(0, 1);  // [rows, 1, dim]
  expect_equal(c.run(1), own.expand({30, 3, 64}).contiguous());
}

TEST(AttentionEdges, LargeScoresDoNotOverflow) {
  Random random(9);
  Case c({.sequences = {{100, 20}}}, random);
  c.q.mul_(500.0);
  expect_is_atens(c, c.run(1));
}

TEST(AttentionEdges, OfDecodingSequencesLargeScoresDoNotOverflow) {
  Random random(20);
  Case c({.sequences = {{200, 2}, {3, 1}}}, random);
  c.decode_all();
  c.split(0, 128);
  c.q.mul_(500.0);
  expect_is_atens(c, c.run(1));
}

// The last key of one chunk, and the first of the next, count once.
TEST(AttentionEdges, EverySeenKeyCountsOnceAcrossChunks) {
  Random random(16);
  for (const int32_t window : {0, 1, 64, 100}) {
    for (const int32_t context : {0, 1, 62, 63, 64, 126, 127, 128, 190, 191, 192}) {
      Case c({.heads = 1, .window = window, .sequences = {{context, 3}}}, random);
      c.split(0, 64);
      expect_seen_keys_count_once(c);
    }
  }
}

TEST(AttentionEdges, LargeScoresDoNotOverflowAcrossChunks) {
  Random random(17);
  Case c({.sequences = {{200, 20}}}, random);
  c.split(0, 64);
  c.q.mul_(500.0);
  expect_is_atens(c, c.run(1));
}

// Design: a slice, a batch or a preemption must not change a row's bits.
TEST(AttentionBits, RowsDoNotDependOnSlicingOrBatch) {
  for (const auto& [dim, window, cap] :
       {std::tuple{64, 0, 0.0f}, {64, 50, 2.0f}, {256, 50, 0.0f}}) {
    Random random(10);
    const Case whole({.heads = 3,
                      .head_dim = dim,
                      .window = window,
                      .softcap = cap,
                      .sequences = {{37, 90}, {0, 11}}},
                     random);
    const at::Tensor want = whole.run(1);
    const at::Tensor out = nan_filled(whole.q.sizes(), at::kBFloat16);
    for (const auto& [begin, end] : {std::pair{0, 13}, {13, 14}, {14, 78}, {78, 90}}) {
      const std::vector<AttentionSlice> slice = {{begin, end - begin, 37 + begin, 0}};
      out.slice(0, begin, end).copy_(whole.run(attention_tiles(slice, 3), 2).slice(0, begin, end));
    }
    expect_equal(out.slice(0, 0, 90), want.slice(0, 0, 90));
  }
}

// Of a sequence whose keys are split: wherever its rows and heads are cut, whatever it is batched
// with, and however few blocks there are.
TEST(AttentionBits, OverSplitKeysRowsDoNotDependOnSlicingBatchOrHeads) {
  for (const auto& [dim, window] : {std::pair{64, 0}, {128, 150}, {256, 0}}) {
    Random random(18);
    Case c({.heads = 6,
            .kv_heads = 2,
            .head_dim = dim,
            .window = window,
            .sequences = {{217, 40}, {300, 1}, {0, 11}}},
           random);
    c.split(0, 128);
    c.split(1, 64);
    const at::Tensor want = c.run(1);
    const at::Tensor out = nan_filled(c.q.sizes(), at::kBFloat16);
    for (const auto& [begin, end] : {std::pair{0, 13}, {13, 14}, {14, 40}}) {
      const std::vector<AttentionSlice> slice = {{begin, end - begin, 217 + begin, 0, 128}};
      const std::vector<AttentionTile> tiles = attention_tiles(slice, 3);
      out.slice(0, begin, end)
          .slice(1, 0, 3)
          .copy_(c.run(tiles, 2, 0, 1).slice(0, begin, end).slice(1, 0, 3));
      out.slice(0, begin, end)
          .slice(1, 3)
          .copy_(c.run(tiles, 3, 1, 2).slice(0, begin, end).slice(1, 3));
    }
    expect_equal(out.slice(0, 0, 40), want.slice(0, 0, 40));
    const std::vector<AttentionSlice> alone = {c.slices[1]};
    expect_equal(c.run(attention_tiles(alone, 3), 4).slice(0, 40, 41), want.slice(0, 40, 41));
  }
}

// Of sequences that decode, likewise; their warps end in another order with every seed.
TEST(AttentionBits, OfDecodingSequencesRowsDoNotDependOnSlicingBatchOrHeads) {
  for (const auto& [dim, window, chunk_keys] :
       {std::tuple{64, 0, 0}, {128, 150, 128}, {256, 0, 64}}) {
    Random random(21);
    Case c({.heads = 6,
            .kv_heads = 2,
            .head_dim = dim,
            .window = window,
            .softcap = window > 0 ? 2.0f : 0.0f,
            // Of the five, two lie in other 16 keys than the last slice's.
            .sequences = {{222, 5}, {300, 1}, {40, 20}}},
           random);
    c.decode_all();
    c.split(0, chunk_keys);
    c.split(1, chunk_keys);
    const at::Tensor want = c.run(1);
    for (const auto& [begin, end] : {std::pair{0, 2}, {2, 3}, {3, 5}}) {
      AttentionSlice slice = c.slices[0];
      slice.row += begin;
      slice.rows = end - begin;
      slice.position += begin;
      const auto tiles = attention_tiles(std::vector<AttentionSlice>{slice}, 3);
      for (int32_t head = 0; head < 2; ++head) {
        const at::Tensor got =
            c.run(tiles, static_cast<uint32_t>(2 + begin + head), head, head + 1);
        expect_equal(got.slice(0, begin, end).slice(1, 3 * head, 3 * head + 3),
                     want.slice(0, begin, end).slice(1, 3 * head, 3 * head + 3));
        EXPECT_EQ(count_finite(got), (end - begin) * 3 * dim);
      }
    }
    const std::vector<AttentionSlice> alone = {c.slices[1]};
    expect_equal(c.run(attention_tiles(alone, 3), 4).slice(0, 5, 6), want.slice(0, 5, 6));
  }
}

TEST(AttentionBits, HeadsDoNotDependOnSlicingByHeads) {
  Random random(15);
  const Case c({.heads = 6, .kv_heads = 3, .sequences = {{20, 30}}}, random);
  const at::Tensor want = c.run(1);
  const std::vector<AttentionTile> tiles = attention_tiles(c.slices, 2);
  for (const auto& [begin, end] : {std::pair{0, 1}, {1, 3}}) {
    const at::Tensor got = c.run(tiles, 2, begin, end);
    expect_equal(got.slice(1, 2 * begin, 2 * end), want.slice(1, 2 * begin, 2 * end));
    EXPECT_EQ(count_finite(got), 30 * 2 * (end - begin) * 64);
  }
}

TEST(AttentionBits, ThreadOrderChangesNothing) {
  Random random(11);
  const Case c({.sequences = {{60, 30}}}, random);
  const at::Tensor want = c.run(1);
  for (uint32_t seed = 2; seed < 6; ++seed)
    expect_equal(c.run(seed), want);
}

// The tile list of a bucket is padded with zeros.
TEST(AttentionTiles, PaddingTilesTouchNothing) {
  Random random(12);
  const Case c({.sequences = {{0, 5}}}, random);
  const std::vector<AttentionTile> padding(
      3, {.row = 0, .position = 0, .sequence = 0, .entry = 0, .entries = 0});
  EXPECT_EQ(count_finite(c.run(padding, 1)), 0);
}

TEST(AttentionTiles, OnlyTheSlicesRowsAreWritten) {
  Random random(13);
  const Case c({.heads = 4, .sequences = {{0, 40}}}, random);
  const at::Tensor out = c.run(attention_tiles(std::vector<AttentionSlice>{{7, 20, 7, 0}}, 4), 1);
  EXPECT_EQ(count_finite(out), 20 * 4 * 64);
  EXPECT_EQ(count_finite(out.slice(0, 7, 27)), 20 * 4 * 64);
}

}  // namespace
}  // namespace flowprefill
