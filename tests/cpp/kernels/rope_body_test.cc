// The rope kernels' bodies against ATen: bias, norms of heads or rows, rotation, and where keys and
// values land in the paged cache.
#include "devices/cuda/kernels/rope_body.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include "simt.h"
#include "tensors.h"

namespace flowprefill {
namespace {

struct Shape {
  int32_t rows, heads, kv_heads, head_dim, turning, block_shift;
  bool has_bias, has_norm;
  bool norms_rows = false;  // where it has norms

  int32_t normed(int32_t count) const { return norms_rows ? count * head_dim : head_dim; }
};

constexpr int32_t kBlocks = 8;  // of the cache; two sequences own four each
constexpr int32_t kTable = 4;
constexpr float kQScale = 0.127f;
constexpr float kEps = 1e-6f;

// Everything one launch reads and writes.
template <typename In>
struct Case {
  Shape shape;
  at::Tensor qkv, bias, q_norm, k_norm, rotary, q, keys, values;
  std::vector<int32_t> sequences, positions, tables;

  Case(const Shape& s, Random& random) : shape(s) {
    const int64_t columns = int64_t{s.heads + 2 * s.kv_heads} * s.head_dim;
    const auto type = std::is_same_v<In, Bf16> ? at::kBFloat16 : at::kFloat;
    qkv = random.floats({s.rows, columns}).to(type);
    bias = random.floats({columns});
    q_norm = random.floats({s.normed(s.heads)});
    k_norm = random.floats({s.normed(s.kv_heads)});
    rotary = random.floats({s.rows, s.turning});
    q = nan_filled({s.rows, int64_t{s.heads} * s.head_dim}, at::kBFloat16);
    const int64_t tokens = int64_t{1} << s.block_shift;
    keys = nan_filled({kBlocks, s.kv_heads, tokens, s.head_dim}, at::kBFloat16);
    values = nan_filled({kBlocks, s.kv_heads, tokens, s.head_dim}, at::kBFloat16);
    tables = random.permutation(kBlocks);
    // Two sequences with distinct positions; every fifth row is padding.
    const std::vector<int32_t> order = random.permutation(static_cast<int32_t>(kTable * tokens));
    for (int32_t row = 0; row < s.rows; ++row) {
      sequences.push_back(row % 5 == 4 ? 0 : 1 + row % 2);
      positions.push_back(order[static_cast<size_t>(row)]);
    }
  }

  RopeArgs<In> args() const {
    const Shape& s = shape;
    const int64_t token = s.head_dim;
    const int64_t head = token << s.block_shift;
    return {.batch = {nullptr, sequences.data(), positions.data(), tables.data(), kTable},
            .qkv = elements<In>(qkv),
            .ld_qkv = qkv.size(1),
            .bias = s.has_bias ? floats(bias) : nullptr,
            .q_norm = s.has_norm ? floats(q_norm) : nullptr,
            .k_norm = s.has_norm ? floats(k_norm) : nullptr,
            .rotary = floats(rotary),
            .q = bits(q),
            .ld_q = q.size(1),
            .cache = {bits(keys), bits(values), head * s.kv_heads, token, head, s.block_shift},
            .q_scale = kQScale,
            .eps = kEps,
            .rows = s.rows,
            .heads = s.heads,
            .kv_heads = s.kv_heads,
            .head_dim = s.head_dim,
            .turning = s.turning,
            .norms_rows = s.norms_rows};
  }

  // Heads [first, first + count) of one row after the bias, double, [count, head_dim].
  at::Tensor heads(int32_t row, int32_t first, int32_t count) const {
    const int64_t begin = int64_t{first} * shape.head_dim;
    const int64_t end = begin + int64_t{count} * shape.head_dim;
    at::Tensor out = qkv[row].slice(0, begin, end).to(at::kDouble);
    if (shape.has_bias)
      out = out + bias.slice(0, begin, end);
    return out.view({count, shape.head_dim});
  }
  // The same after norm and rotation.
  at::Tensor rotated(int32_t row, at::Tensor heads, const at::Tensor& norm, double scale) const {
    if (shape.has_norm) {
      const at::Tensor rows = shape.norms_rows ? heads.view({1, -1}) : heads;
      heads = at::rms_norm(rows, {rows.size(1)}, norm.to(at::kDouble), kEps).view(heads.sizes());
    }
    const int64_t half = shape.turning / 2;
    const at::Tensor a = heads.slice(1, 0, half);
    const at::Tensor b = heads.slice(1, half, shape.turning);
    const at::Tensor cos = rotary[row].slice(0, 0, half);
    const at::Tensor sin = rotary[row].slice(0, half);
    const at::Tensor rest = heads.slice(1, shape.turning);
    return at::cat({a * cos - b * sin, b * cos + a * sin, rest}, 1) * scale;
  }
  // Where a row's key or value of a head lies.
  at::Tensor slot(const at::Tensor& cache, int32_t row, int32_t head) const {
    const int32_t position = positions[static_cast<size_t>(row)];
    const int32_t sequence = sequences[static_cast<size_t>(row)] - 1;
    const int32_t block =
        tables[static_cast<size_t>(sequence * kTable + (position >> shape.block_shift))];
    return cache[block][head][position % (1 << shape.block_shift)];
  }
};

// a cos - b sin may cancel: the bound is on the terms, not on the result.
void expect_rotated(const at::Tensor& got, const at::Tensor& want) {
  expect_close(got, want, kBf16Rounding, 5e-6);
}

template <typename In>
void test_rope(const Shape& shape, uint32_t seed) {
  Random random(seed);
  Case<In> c(shape, random);
  const RopeArgs<In> args = c.args();
  check(args);
  const int32_t warps = 2;
  const int32_t all_heads = shape.heads + 2 * shape.kv_heads;
  simt::launch({.x = shape.rows,
                .y = shape.norms_rows ? kRopeRowParts : (all_heads + warps - 1) / warps,
                .threads = warps * 32,
                .shared_bytes = warps * sizeof(float),
                .seed = seed,
                .overlaps = !shape.norms_rows},
               [&](const simt::Thread& t) {
                 if (shape.norms_rows)
                   rope_rows_body<In>(t, args);
                 else
                   rope_body<In>(t, args);
               });
  int64_t written = 0;
  for (int32_t row = 0; row < shape.rows; ++row) {
    const bool is_padding = c.sequences[static_cast<size_t>(row)] == 0;
    const at::Tensor queries =
        c.rotated(row, c.heads(row, 0, shape.heads), c.q_norm, kQScale).view({-1});
    expect_rotated(c.q[row], is_padding ? queries * 0.0 : queries);
    const at::Tensor keys =
        c.rotated(row, c.heads(row, shape.heads, shape.kv_heads), c.k_norm, 1.0);
    const at::Tensor values = c.heads(row, shape.heads + shape.kv_heads, shape.kv_heads);
    for (int32_t h = 0; h < shape.kv_heads && !is_padding; ++h) {
      expect_rotated(c.slot(c.keys, row, h), keys[h]);
      expect_close(c.slot(c.values, row, h), values[h], kBf16Rounding, 1e-6);
    }
    written += is_padding ? 0 : int64_t{shape.kv_heads} * shape.head_dim;
  }
  // Nothing else was touched.
  EXPECT_EQ(count_finite(c.keys), written);
  EXPECT_EQ(count_finite(c.values), written);
}

class Rope : public testing::TestWithParam<uint32_t> {};

TEST_P(Rope, IsAtensWithinRoundingAndWritesItsSlotsOnly) {
  Random random(GetParam());
  const int32_t kv_heads = random.integer(1, 3);
  const int32_t head_dim = 4 * random.integer(1, 64);
  const Shape shape{.rows = random.integer(1, 12),
                    .heads = kv_heads * random.integer(1, 3),
                    .kv_heads = kv_heads,
                    .head_dim = head_dim,
                    .turning = random.coin() ? head_dim : 4 * random.integer(1, head_dim / 4),
                    .block_shift = random.integer(2, 5),
                    .has_bias = random.coin(),
                    .has_norm = random.coin(),
                    .norms_rows = random.coin()};
  test_rope<float>(shape, GetParam());
  test_rope<Bf16>(shape, GetParam());
}

INSTANTIATE_TEST_SUITE_P(Seeds, Rope, testing::Range(1u, 17u));

// Warming a graph runs it on zeroed inputs while other requests hold blocks of the cache.
TEST(RopePadding, ZeroedInputsTouchNoBlock) {
  Random random(3);
  Case<float> c({.rows = 4,
                 .heads = 2,
                 .kv_heads = 1,
                 .head_dim = 64,
                 .turning = 64,
                 .block_shift = 3,
                 .has_bias = true,
                 .has_norm = true},
                random);
  c.sequences.assign(4, 0);
  c.positions.assign(4, 0);
  c.tables.assign(kBlocks, 0);
  const RopeArgs<float> args = c.args();
  simt::launch({.x = 4, .y = 2, .threads = 64, .overlaps = true},
               [&](const simt::Thread& t) { rope_body<float>(t, args); });
  EXPECT_EQ(count_finite(c.keys) + count_finite(c.values), 0);
  expect_equal(c.q, at::zeros_like(c.q));
}

}  // namespace
}  // namespace flowprefill
