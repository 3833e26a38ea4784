#include "devices/cuda/kernels/fp8_args.h"

#include "devices/cuda/kernels/expect.h"

namespace flowprefill {
namespace {

constexpr const char* kMultiple = "a positive multiple of 8";

void expect_sizes(int32_t rows, int32_t width, int64_t ld_in, int64_t ld_out) {
  expect(rows >= 1, "rows", rows, "at least 1");
  expect(width >= 8 && width % 8 == 0, "width", width, kMultiple);
  expect(ld_in >= width && ld_in % 8 == 0, "ld of the input", ld_in, kMultiple);
  expect(ld_out >= width && ld_out % 8 == 0, "ld of the output", ld_out, kMultiple);
}

}  // namespace

void check(const QuantiseArgs& args) {
  expect_sizes(args.rows, args.width, args.ld_in, args.ld_out);
  expect_aligned("in", args.in);
  expect_aligned("out", args.out, 8);
}

void check(const WidenArgs& args) {
  expect_sizes(args.rows, args.width, args.ld_in, args.ld_out);
  expect_aligned("in", args.in, 8);
  expect_aligned("out", args.out);
}

void check(const RescaleArgs& args) {
  expect_sizes(args.rows, args.width(), args.ld_in, args.ld_out);
  expect(args.ld_in >= args.columns, "ld of the input", args.ld_in, "at least the columns");
  if (args.is_gated) {
    expect(args.output == GemmOutput::kBf16, "output", 0, "bf16 where gated");
    expect(!args.adds_to_out, "adds_to_out", 1, "false where gated");
  }
  expect_aligned("in", args.in);
  expect_aligned("column_scales", args.column_scales);
  expect_aligned("bias", args.bias);
  expect_aligned("out", args.out);
}

}  // namespace flowprefill
