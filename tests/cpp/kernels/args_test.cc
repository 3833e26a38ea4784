// check() of every kernel's arguments: what is accepted, and what a refusal says; the order of the
// GEMM kernels to try.
#include <gtest/gtest.h>

#include <string>

#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/gemm_args.h"
#include "devices/cuda/kernels/row_args.h"
#include "devices/cuda/kernels/sample_args.h"

namespace flowprefill {
namespace {

template <typename Args>
std::string refusal(const Args& args) {
  try {
    check(args);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

// `args` with one change.
template <typename Args, typename Change>
std::string refusal(Args args, Change change) {
  change(args);
  return refusal(args);
}

alignas(16) unsigned char memory[64];

GemmArgs gemm(int32_t rows = 100, int32_t columns = 256, int32_t depth = 64) {
  const auto* in = reinterpret_cast<const Bf16*>(memory);
  return {.a = in,
          .lda = depth,
          .b = in,
          .ldb = depth,
          .d = memory,
          .ldd = columns,
          .row_end = rows,
          .columns = columns,
          .depth = depth};
}

TEST(GemmArgs, SaysWhichFieldIsWrong) {
  EXPECT_EQ(refusal(gemm()), "accepted");
  EXPECT_EQ(refusal(gemm(), [](GemmArgs& g) { g.row_begin = -1; }),
            "row_begin: got -1, expected at least 0");
  EXPECT_EQ(refusal(gemm(), [](GemmArgs& g) { g.row_begin = 100; }),
            "row_end: got 100, expected more than row_begin");
  EXPECT_EQ(refusal(gemm(), [](GemmArgs& g) { g.columns = 250; }),
            "columns: got 250, expected a positive multiple of 4");
  EXPECT_EQ(refusal(gemm(), [](GemmArgs& g) { g.depth = 60; }),
            "depth: got 60, expected a positive multiple of 8");
  EXPECT_EQ(refusal(gemm(), [](GemmArgs& g) { g.lda = 56; }),
            "lda: got 56, expected a multiple of 8, at least depth");
  EXPECT_EQ(refusal(gemm(), [](GemmArgs& g) { g.ldb = 65; }),
            "ldb: got 65, expected a multiple of 8, at least depth");
  EXPECT_EQ(refusal(gemm(), [](GemmArgs& g) { g.ldd = 128; }),
            "ldd: got 128, expected a multiple of 4, at least the columns of d");
  EXPECT_EQ(refusal(gemm(), [](GemmArgs& g) { g.b = nullptr; }),
            "a, b, d: got 0, expected no null");
  EXPECT_EQ(refusal(gemm(), [](GemmArgs& g) { g.a = reinterpret_cast<const Bf16*>(memory + 2); }),
            "a: got 2, expected an address with remainder 0 by 16");
}

TEST(GemmArgs, Bf16OutputNeedsColumnsByEight) {
  const auto as_bf16 = [](GemmArgs& g) {
    g.output = GemmOutput::kBf16;
    g.columns = g.ldd = 252;
  };
  EXPECT_EQ(refusal(gemm(), as_bf16), "columns: got 252, expected a positive multiple of 8");
}

TEST(GemmArgs, AGatedProductHasHalfTheColumnsInBf16) {
  const auto gated = [](GemmArgs& g) {
    g.is_gated = true;
    g.output = GemmOutput::kBf16;
    g.ldd = 128;
  };
  EXPECT_EQ(refusal(gemm(), gated), "accepted");
  GemmArgs good = gemm();
  gated(good);
  EXPECT_EQ(good.d_columns(), 128);
  EXPECT_EQ(refusal(good, [](GemmArgs& g) { g.ldd = 120; }),
            "ldd: got 120, expected a multiple of 8, at least the columns of d");
  EXPECT_EQ(refusal(good, [](GemmArgs& g) { g.columns = 248; }),
            "columns: got 248, expected a positive multiple of 16 where gated");
  EXPECT_EQ(refusal(good, [](GemmArgs& g) { g.output = GemmOutput::kFloat; }),
            "output: got 0, expected bf16 where gated");
  EXPECT_EQ(refusal(good, [](GemmArgs& g) { g.adds_to_d = true; }),
            "adds_to_d: got 1, expected false where gated");
  EXPECT_EQ(refusal(good, [](GemmArgs& g) { g.scale = 2.0f; }),
            "scale: got 2, expected 1 where gated");
}

TEST(GemmArgs, ARowRangeStartsAtItsRow) {
  GemmArgs g = gemm();
  g.row_begin = 10;
  EXPECT_EQ(g.rows(), 90);
  EXPECT_EQ(g.first_a() - g.a, 10 * 64);
  EXPECT_EQ(g.first_d<float>() - static_cast<float*>(g.d), 10 * 256);
  EXPECT_EQ(g.first_d<Bf16>() - static_cast<Bf16*>(g.d), 10 * 256);
}

TEST(GemmTiles, WideOnesFirstWhereEveryMultiprocessorHasWork) {
  using enum GemmTile;
  const GemmArgs big = gemm(8192, 4096, 4096);
  EXPECT_EQ(gemm_tiles(big, 80, 108), (std::vector{kAmpere256x128, kAmpere128x128, kAmpere64x64}));
  EXPECT_EQ(gemm_tiles(big, 90, 132),
            (std::vector{kHopper128x256, kAmpere256x128, kAmpere128x128, kAmpere64x64}));
  EXPECT_EQ(gemm_tiles(big, 100, 148), (std::vector{kAmpere256x128, kAmpere128x128, kAmpere64x64}));
  const GemmArgs small = gemm(16, 4096, 4096);
  EXPECT_EQ(gemm_tiles(small, 80, 108),
            (std::vector{kFewRows, kAmpere64x64, kAmpere128x128, kAmpere256x128}));
  EXPECT_EQ(gemm_tiles(gemm(17, 4096, 4096), 80, 108).front(), kAmpere64x64);
  EXPECT_TRUE(gemm_tiles(big, 75, 40).empty());
  GemmArgs gated = big;
  gated.is_gated = true;
  EXPECT_EQ(gemm_tiles(gated, 90, 132), gemm_tiles(gated, 80, 132));  // no fused kernel of its own
  for (const GemmArgs& args : {big, small}) {
    for (const GemmTile tile : gemm_tiles(args, 90, 132))
      EXPECT_STRNE(gemm_tile_name(tile), "?");
  }
}

TEST(GemmTiles, OfFewRowsTakesSixteen) {
  check_tile(gemm(16, 256, 64), GemmTile::kFewRows);
  check_tile(gemm(17, 256, 64), GemmTile::kAmpere64x64);
  EXPECT_THROW(check_tile(gemm(17, 256, 64), GemmTile::kFewRows), std::invalid_argument);
}

TEST(GemmTiles, OfFewRowsAloneTakesFp8AndRowsThatAreQuantised) {
  alignas(16) const E4m3 codes[16] = {};
  alignas(16) const float scales[4] = {};
  GemmArgs g = gemm(16, 256, 64);
  g.fp8 = {.b = codes, .b_scales = scales};
  const auto refused_by = [&g](GemmTile tile) -> std::string {
    try {
      check_tile(g, tile);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refused_by(GemmTile::kFewRows), "fp8.a: got 0, expected no null where weights are FP8");
  g.fp8.a = codes;
  EXPECT_EQ(refused_by(GemmTile::kFewRows), "");
  EXPECT_EQ(refused_by(GemmTile::kAmpere64x64),
            "weights: got 8, expected bf16: tiles other than few_rows have none of FP8");
}

TEST(RowArgs, SayWhichFieldIsWrong) {
  EXPECT_EQ(refusal(EmbedArgs{.ld_table = 12, .ld_hidden = 12, .rows = 1, .width = 12}),
            "width: got 12, expected a positive multiple of 8");
  EXPECT_EQ(refusal(EmbedArgs{.ld_table = 8, .ld_hidden = 8, .rows = 0, .width = 8}),
            "rows: got 0, expected at least 1");
  EXPECT_EQ(refusal(RotaryArgs{.rows = 1, .turning = 7}),
            "turning: got 7, expected an even number, 2..256");
  EXPECT_EQ(refusal(RmsNormArgs<Bf16>{.ld_hidden = 6, .ld_out = 8, .rows = 1, .width = 4}),
            "ld of the input: got 6, expected a positive multiple of 4");
  EXPECT_EQ(refusal(ResidualArgs{.ld_in = 8, .ld_hidden = 6, .rows = 1, .width = 4}),
            "ld of the output: got 6, expected a positive multiple of 4");
  EXPECT_EQ(refusal(RoundArgs{.ld_in = 12, .ld_out = 16, .rows = 1, .width = 8}),
            "ld of the input: got 12, expected a positive multiple of 8");
  EXPECT_EQ(refusal(SoftcapArgs{.ld_values = 8, .rows = 1, .width = 8}),
            "cap: got 0, expected above 0");
  EXPECT_EQ(refusal(GateArgs<float>{.ld_in = 8, .ld_out = 8, .rows = 1, .width = 8}),
            "ld_in: got 8, expected at least 2 width");
}

TEST(SampleArgs, SayWhichFieldIsWrong) {
  const float logits[8] = {};
  const SamplingParams params = {};
  int32_t out = 0;
  const SampleArgs good{
      .logits = logits, .ld_logits = 8, .params = &params, .out = &out, .rows = 1, .width = 8};
  using Args = SampleArgs;
  EXPECT_EQ(refusal(good), "accepted");
  EXPECT_EQ(refusal(good, [](Args& a) { a.rows = 0; }), "rows: got 0, expected at least 1");
  EXPECT_EQ(refusal(good, [](Args& a) { a.width = (1 << 22) + 1; }),
            "width: got 4194305, expected 1..4194304");
  EXPECT_EQ(refusal(good, [](Args& a) { a.ld_logits = 7; }),
            "ld_logits: got 7, expected at least width");
  EXPECT_EQ(refusal(good, [](Args& a) { a.params = nullptr; }),
            "logits, params, out: got 0, expected no null");
}

TEST(RopeArgs, SayWhichFieldIsWrong) {
  const RopeArgs<float> good{.ld_qkv = 4 * 64,
                             .ld_q = 2 * 64,
                             .cache = {.block_shift = 4},
                             .rows = 1,
                             .heads = 2,
                             .kv_heads = 1,
                             .head_dim = 64,
                             .turning = 32};
  using Args = RopeArgs<float>;
  EXPECT_EQ(refusal(good), "accepted");
  for (const int32_t turning : {0, 30, 68})
    EXPECT_EQ(
        refusal(good, [turning](Args& a) { a.turning = turning; }),
        "turning: got " + std::to_string(turning) + ", expected a multiple of 4, at most head_dim");
  for (const int32_t head_dim : {0, 62, 260})
    EXPECT_EQ(
        refusal(good, [head_dim](Args& a) { a.head_dim = head_dim; }),
        "head_dim: got " + std::to_string(head_dim) + ", expected a multiple of 4, at most 256");
  EXPECT_EQ(refusal(good, [](Args& a) { a.ld_qkv = 257; }),
            "ld_qkv: got 257, expected an even number");
  EXPECT_EQ(refusal(good, [](Args& a) { a.cache.token_stride = 65; }),
            "stride of the cache: got 65, expected an even number");
  EXPECT_EQ(refusal(good, [](Args& a) { a.qkv = reinterpret_cast<const float*>(uintptr_t{4}); }),
            "qkv: got 4, expected an address with remainder 0 by 8");
  EXPECT_EQ(refusal(good, [](Args& a) { a.kv_heads = 3; }),
            "kv_heads: got 3, expected at least 1, at most heads");
  EXPECT_EQ(refusal(good, [](Args& a) { a.ld_qkv = 255; }),
            "ld_qkv: got 255, expected at least (heads + 2 kv_heads) head_dim");
  EXPECT_EQ(refusal(good, [](Args& a) { a.cache.block_shift = 31; }),
            "block_shift: got 31, expected 0..30");
}

TEST(AttentionArgs, SayWhichFieldIsWrong) {
  const AttentionArgs good{.ld_q = 128,
                           .ld_out = 128,
                           .cache = {nullptr, nullptr, 1024, 64, 512, 4},
                           .num_tiles = 1,
                           .heads = 2,
                           .kv_heads = 1,
                           .kv_end = 1,
                           .head_dim = 64};
  using Args = AttentionArgs;
  EXPECT_EQ(refusal(good), "accepted");
  EXPECT_EQ(refusal(good, [](Args& a) { a.head_dim = 80; }),
            "head_dim: got 80, expected 64, 96, 128 or 256");
  EXPECT_EQ(refusal(good, [](Args& a) { a.heads = 3, a.kv_heads = 2; }),
            "heads: got 3, expected a positive multiple of kv_heads");
  EXPECT_EQ(refusal(good, [](Args& a) { a.window = -1; }),
            "window: got -1, expected at least 0 (0: all keys)");
  EXPECT_EQ(refusal(good, [](Args& a) { a.softcap = -1; }),
            "softcap: got -1, expected at least 0 (0: none)");
  EXPECT_EQ(refusal(good, [](Args& a) { a.kv_begin = 1; }),
            "kv_end: got 1, expected more than kv_begin, at most kv_heads");
  EXPECT_EQ(refusal(good, [](Args& a) { a.kv_end = 2; }),
            "kv_end: got 2, expected more than kv_begin, at most kv_heads");
  EXPECT_EQ(refusal(good, [](Args& a) { a.num_tiles = 0; }),
            "num_tiles: got 0, expected at least 1");
  EXPECT_NE(refusal(good, [](Args& a) { a.cache.token_stride = 68; }).find("multiples of 8"),
            std::string::npos);
}

TEST(AttentionArgs, ForHopperSayWhichFieldIsWrong) {
  const AttentionArgs good{.ld_q = 128,
                           .ld_out = 128,
                           .cache = {nullptr, nullptr, 1024, 64, 512, 3},
                           .num_tiles = 1,
                           .rows = 1,
                           .heads = 2,
                           .kv_heads = 1,
                           .kv_end = 1,
                           .head_dim = 64};
  const auto refusal_of_rows = [&](auto change) -> std::string {
    AttentionArgs args = good;
    change(args);
    try {
      check_rows(args);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "accepted";
  };
  using Args = AttentionArgs;
  EXPECT_EQ(refusal_of_rows([](Args&) {}), "accepted");
  EXPECT_EQ(refusal_of_rows([](Args& a) { a.head_dim = 96; }),
            "head_dim: got 96, expected 64, 128 or 256");
  EXPECT_EQ(refusal_of_rows([](Args& a) { a.cache.block_shift = 2; }),
            "block_shift: got 2, expected at least 3 (blocks of 8 tokens)");
  EXPECT_EQ(refusal_of_rows([](Args& a) { a.rows = 0; }), "rows: got 0, expected at least 1");
  alignas(16) float partials[4] = {};
  const auto with_chunks = [&](auto change) {
    return refusal_of_rows([&](Args& a) {
      a.num_merges = 1, a.partial_rows = 1, a.partials = partials;
      change(a);
    });
  };
  EXPECT_EQ(with_chunks([](Args&) {}), "accepted");
  EXPECT_EQ(with_chunks([](Args& a) { a.window = 5; }),
            "num_merges: got 1, expected 0 within a window: these tiles have no chunks");
  EXPECT_EQ(with_chunks([](Args& a) { a.partial_rows = 0; }),
            "partial_rows: got 0, expected at least 1");
}

}  // namespace
}  // namespace flowprefill
