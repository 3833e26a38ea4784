#include "devices/cuda/kernels/score_args.h"

#include "devices/cuda/kernels/expect.h"

namespace flowprefill {

// Tokens with larger logits are counted in floats: exact up to 2^24.
void check(const ScoreArgs& args) {
  expect(args.rows >= 1, "rows", args.rows, "at least 1");
  expect(args.batch_rows >= args.rows, "batch_rows", args.batch_rows, "at least rows");
  expect(args.width >= 1 && args.width <= 1 << 24, "width", args.width, "1..16777216");
  expect(args.ld_logits >= args.width, "ld_logits", args.ld_logits, "at least width");
  expect(args.logits != nullptr && args.out != nullptr && args.next_tokens != nullptr,
         "logits, out, next_tokens", 0, "no null");
}

void check(const PoolArgs& args) {
  expect(args.rows >= 1, "rows", args.rows, "at least 1");
  expect(args.row_begin >= 0, "row_begin", args.row_begin, "at least 0");
  expect(args.width >= 1, "width", args.width, "at least 1");
  expect(args.ld_in >= args.width, "ld_in", args.ld_in, "at least width");
  expect(args.ld_out >= args.width, "ld_out", args.ld_out, "at least width");
  expect(args.in != nullptr && args.out != nullptr && args.last_rows != nullptr,
         "in, out, last_rows", 0, "no null");
}

}  // namespace flowprefill
