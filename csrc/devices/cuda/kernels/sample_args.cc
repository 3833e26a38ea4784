#include "devices/cuda/kernels/sample_args.h"

#include "devices/cuda/kernels/expect.h"

namespace flowprefill {

void check(const SampleArgs& args) {
  expect(args.rows >= 1, "rows", args.rows, "at least 1");
  expect(args.width >= 1 && args.width <= kMaxSampleWidth, "width", args.width, "1..4194304");
  expect(args.ld_logits >= args.width, "ld_logits", args.ld_logits, "at least width");
  expect(args.logits != nullptr && args.params != nullptr && args.out != nullptr,
         "logits, params, out", 0, "no null");
}

}  // namespace flowprefill
