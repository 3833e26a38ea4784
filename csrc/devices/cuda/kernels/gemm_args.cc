#include "devices/cuda/kernels/gemm_args.h"

#include <algorithm>

#include "devices/cuda/kernels/expect.h"

namespace flowprefill {
namespace {

constexpr int64_t kAccessBytes = 16;

int32_t tile_rows(GemmTile tile) {
  switch (tile) {
    case GemmTile::kAmpere64x64:
      return 64;
    case GemmTile::kAmpere256x128:
      return 256;
    default:
      return 128;
  }
}

int32_t tile_columns(GemmTile tile) {
  switch (tile) {
    case GemmTile::kAmpere64x64:
      return 64;
    case GemmTile::kHopper128x256:
      return 256;
    default:
      return 128;
  }
}

int64_t blocks(const GemmArgs& args, GemmTile tile) {
  const int64_t down = (args.rows() + tile_rows(tile) - 1) / tile_rows(tile);
  const int64_t across = (args.columns + tile_columns(tile) - 1) / tile_columns(tile);
  return down * across;
}

void check_fp8(const GemmArgs& args) {
  if (!args.is_fp8())
    return;
  const char* multiple = "a multiple of 16 where weights are FP8";
  expect(args.columns % 16 == 0, "columns", args.columns, multiple);
  expect(args.depth % 16 == 0, "depth", args.depth, multiple);
  expect(args.ldb % 16 == 0, "ldb", args.ldb, multiple);
  expect(args.fp8.a == nullptr || args.lda % 16 == 0, "lda", args.lda, multiple);
  expect(args.fp8.b_scales != nullptr, "b_scales", 0, "no null");
  expect_aligned("fp8.a", args.fp8.a);
  expect_aligned("fp8.b", args.fp8.b);
  expect_aligned("b_scales", args.fp8.b_scales);
  expect_aligned("a_scales", args.fp8.a_scales);
}

}  // namespace

const char* gemm_tile_name(GemmTile tile) {
  switch (tile) {
    case GemmTile::kFewRows:
      return "few_rows";
    case GemmTile::kAmpere64x64:
      return "ampere_64x64";
    case GemmTile::kAmpere128x128:
      return "ampere_128x128";
    case GemmTile::kAmpere256x128:
      return "ampere_256x128";
    case GemmTile::kHopper128x256:
      return "hopper_128x256";
  }
  return "?";
}

std::vector<GemmTile> gemm_tiles(const GemmArgs& args, int compute_capability,
                                 int num_multiprocessors) {
  if (compute_capability < 80)
    return {};
  std::vector<GemmTile> wide_first = {GemmTile::kAmpere256x128, GemmTile::kAmpere128x128,
                                      GemmTile::kAmpere64x64};
  if (compute_capability == 90 && !args.is_gated) {
    wide_first.insert(wide_first.begin(), GemmTile::kHopper128x256);
  }
  // A tile that leaves multiprocessors without work goes behind those that do not.
  std::vector<GemmTile> busy;
  std::vector<GemmTile> idle;
  for (const GemmTile tile : wide_first) {
    (blocks(args, tile) >= num_multiprocessors ? busy : idle).push_back(tile);
  }
  busy.insert(busy.end(), idle.rbegin(), idle.rend());
  if (args.rows() <= kMostFewRows)
    busy.insert(busy.begin(), GemmTile::kFewRows);
  return busy;
}

void check(const GemmArgs& args) {
  const int64_t element_bytes = args.output == GemmOutput::kFloat ? 4 : 2;
  const int64_t step = kAccessBytes / element_bytes;
  const char* multiple = step == 4 ? "a positive multiple of 4" : "a positive multiple of 8";
  expect(args.row_begin >= 0, "row_begin", args.row_begin, "at least 0");
  expect(args.row_end > args.row_begin, "row_end", args.row_end, "more than row_begin");
  if (args.is_gated) {
    expect(args.columns > 0 && args.columns % 16 == 0, "columns", args.columns,
           "a positive multiple of 16 where gated");
    expect(args.output == GemmOutput::kBf16, "output", 0, "bf16 where gated");
    expect(!args.adds_to_d, "adds_to_d", 1, "false where gated");
    expect(args.scale == 1.0f, "scale", static_cast<int64_t>(args.scale), "1 where gated");
  }
  expect(args.columns > 0 && args.columns % step == 0, "columns", args.columns, multiple);
  expect(args.depth > 0 && args.depth % 8 == 0, "depth", args.depth, "a positive multiple of 8");
  expect(args.lda >= args.depth && args.lda % 8 == 0, "lda", args.lda,
         "a multiple of 8, at least depth");
  expect(args.ldb >= args.depth && args.ldb % 8 == 0, "ldb", args.ldb,
         "a multiple of 8, at least depth");
  expect(args.ldd >= args.d_columns() && args.ldd % step == 0, "ldd", args.ldd,
         step == 4 ? "a multiple of 4, at least the columns of d"
                   : "a multiple of 8, at least the columns of d");
  const int64_t largest = std::max({args.lda, args.ldb, args.ldd});
  expect(largest <= INT32_MAX, "lda, ldb, ldd", largest, "below 2^31");
  const bool has_a = args.a != nullptr || (args.is_fp8() && args.fp8.a != nullptr);
  const bool has_b = args.b != nullptr || args.is_fp8();
  expect(has_a && has_b && args.d != nullptr, "a, b, d", 0, "no null");
  check_fp8(args);
  expect_aligned("a", args.a);
  expect_aligned("b", args.b);
  expect_aligned("d", args.d);
  expect_aligned("bias", args.bias);
}

void check_tile(const GemmArgs& args, GemmTile tile) {
  check(args);
  expect(tile != GemmTile::kFewRows || args.rows() <= kMostFewRows, "rows", args.rows(),
         "at most 16 by few_rows");
  expect(!args.is_fp8() || tile == GemmTile::kFewRows, "weights", 8,
         "bf16: tiles other than few_rows have none of FP8");
  expect(!args.is_fp8() || args.fp8.a != nullptr, "fp8.a", 0, "no null where weights are FP8");
}

}  // namespace flowprefill
