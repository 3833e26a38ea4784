#include "devices/cuda/kernels/row_args.h"

#include "devices/cuda/kernels/expect.h"

namespace flowprefill {
namespace {

constexpr int32_t kMaxHeadDim = 256;

void expect_rows(int32_t rows) {
  expect(rows >= 1, "rows", rows, "at least 1");
}

// Columns are moved `step` at a time, so width and strides are whole steps.
void expect_width(int32_t width, int64_t ld_in, int64_t ld_out, int32_t step) {
  const char* multiple = step == 8 ? "a positive multiple of 8" : "a positive multiple of 4";
  expect(width >= step && width % step == 0, "width", width, multiple);
  expect(ld_in >= width && ld_in % step == 0, "ld of the input", ld_in, multiple);
  expect(ld_out >= width && ld_out % step == 0, "ld of the output", ld_out, multiple);
}

}  // namespace

void check(const EmbedArgs& args) {
  expect_rows(args.rows);
  expect_width(args.width, args.ld_table, args.ld_hidden, 8);
  expect_aligned("table", args.table);
  expect_aligned("hidden", args.hidden);
}

void check(const RotaryArgs& args) {
  expect_rows(args.rows);
  expect(args.turning >= 2 && args.turning % 2 == 0 && args.turning <= kMaxHeadDim, "turning",
         args.turning, "an even number, 2..256");
}

template <typename Out>
void check(const RmsNormArgs<Out>& args) {
  expect_rows(args.rows);
  expect_width(args.width, args.ld_hidden, args.ld_out, 4);
  expect_aligned("hidden", args.hidden);
  expect_aligned("weight", args.weight);
  expect_aligned("out", args.out, 4 * sizeof(Out));
}

void check(const ResidualArgs& args) {
  expect_rows(args.rows);
  expect_width(args.width, args.ld_in, args.ld_hidden, 4);
  expect_aligned("in", args.in);
  expect_aligned("weight", args.weight);
  expect_aligned("hidden", args.hidden);
}

void check(const RoundArgs& args) {
  expect_rows(args.rows);
  expect_width(args.width, args.ld_in, args.ld_out, 8);
  expect_aligned("in", args.in);
  expect_aligned("out", args.out);
}

void check(const SoftcapArgs& args) {
  expect_rows(args.rows);
  expect_width(args.width, args.ld_values, args.ld_values, 4);
  expect(args.cap > 0, "cap", static_cast<int64_t>(args.cap), "above 0");
  expect_aligned("values", args.values);
}

template <typename In>
void check(const RopeArgs<In>& args) {
  expect_rows(args.rows);
  expect(args.head_dim >= 4 && args.head_dim <= kMaxHeadDim && args.head_dim % 4 == 0, "head_dim",
         args.head_dim, "a multiple of 4, at most 256");
  expect(args.turning >= 4 && args.turning <= args.head_dim && args.turning % 4 == 0, "turning",
         args.turning, "a multiple of 4, at most head_dim");
  expect(args.heads >= 1, "heads", args.heads, "at least 1");
  expect(args.kv_heads >= 1 && args.kv_heads <= args.heads, "kv_heads", args.kv_heads,
         "at least 1, at most heads");
  const int64_t columns = int64_t{args.heads + 2 * args.kv_heads} * args.head_dim;
  expect(args.ld_qkv >= columns, "ld_qkv", args.ld_qkv, "at least (heads + 2 kv_heads) head_dim");
  expect(args.ld_q >= int64_t{args.heads} * args.head_dim, "ld_q", args.ld_q,
         "at least heads times head_dim");
  expect(args.ld_qkv % 2 == 0, "ld_qkv", args.ld_qkv, "an even number");
  expect(args.ld_q % 2 == 0, "ld_q", args.ld_q, "an even number");
  for (const int64_t stride :
       {args.cache.block_stride, args.cache.token_stride, args.cache.head_stride})
    expect(stride % 2 == 0, "stride of the cache", stride, "an even number");
  expect_aligned("qkv", args.qkv, 8);
  expect_aligned("bias", args.bias, 8);
  expect_aligned("q_norm", args.q_norm, 8);
  expect_aligned("k_norm", args.k_norm, 8);
  expect_aligned("rotary", args.rotary, 8);
  expect_aligned("q", args.q, 8);
  expect_aligned("keys", args.cache.keys, 8);
  expect_aligned("values", args.cache.values, 8);
  expect(args.cache.block_shift >= 0 && args.cache.block_shift < 31, "block_shift",
         args.cache.block_shift, "0..30");
}

template <typename In>
void check(const GateArgs<In>& args) {
  expect_rows(args.rows);
  expect_width(args.width, args.ld_in, args.ld_out, 8);
  expect(args.ld_in >= 2 * int64_t{args.width}, "ld_in", args.ld_in, "at least 2 width");
  expect_aligned("in", args.in);
  expect_aligned("out", args.out);
}

template void check<float>(const RmsNormArgs<float>&);
template void check<Bf16>(const RmsNormArgs<Bf16>&);
template void check<float>(const RopeArgs<float>&);
template void check<Bf16>(const RopeArgs<Bf16>&);
template void check<float>(const GateArgs<float>&);
template void check<Bf16>(const GateArgs<Bf16>&);

}  // namespace flowprefill
