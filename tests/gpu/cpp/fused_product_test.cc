// Products of few rows with norm and rope fused, on the device: as plain loops, and with the bits
// of the three kernels one after another.
#include <cmath>

#include "device_test.h"

namespace flowprefill::testing {
namespace {

constexpr int32_t kBlockShift = 3;
constexpr int32_t kTableStride = 2;  // blocks of each sequence, which is a row
constexpr int32_t kHeads = 6;
constexpr int32_t kKvHeads = 2;
constexpr float kEps = 1e-5f;

struct Shape {
  int32_t rows = 2;
  int32_t depth = 1032;
  int32_t head_dim = 128;
  bool norms = true;
  bool ropes = true;  // false: gated
  bool has_bias = false;
};

class Fused : public DeviceTest {
 protected:
  void make(const Shape& shape) {
    forget();
    shape_ = shape;
    const auto rows = static_cast<size_t>(shape.rows);
    const auto depth = static_cast<size_t>(shape.depth);
    const auto columns = static_cast<size_t>(this->columns());
    hidden_ = &add("hidden", normals(rows * depth));
    norm_ = &add("norm", normals(depth));
    a_ = &add("a", halves(rows * depth));
    b_ = &add("b", halves(columns * depth, 0.1f));
    bias_ = &add("bias", normals(columns));
    std::vector<int32_t> of_row, at_row;
    for (int32_t row = 0; row < shape.rows; ++row) {
      of_row.push_back(row == 1 ? 0 : row + 1);  // the second is padding
      at_row.push_back(5 * row % (kTableStride << kBlockShift));
    }
    sequences_ = &add("sequences", std::move(of_row));
    positions_ = &add("positions", std::move(at_row));
    tables_ = &add("block_tables", permutation(shape.rows * kTableStride));
    rotary_ = &add("rotary", normals(rows * static_cast<size_t>(shape.head_dim)));
    normed_ = &add("normed", filled_halves(rows * depth));
    d_ = &add("d", filled_halves(rows * columns));
    q_ = &add("q", filled_halves(rows * static_cast<size_t>(kHeads * shape.head_dim)));
    const size_t cached = rows * kTableStride * static_cast<size_t>(head_stride() * kKvHeads);
    keys_ = &add("keys", filled_halves(cached));
    values_ = &add("values", filled_halves(cached));
    // Sums round differently: by a share of the terms, which may cancel.
    for (Array<Bf16>* out : {d_, q_, keys_, values_})
      out->allow(2 * kOneStep, 0.05);
  }

  int32_t columns() const { return shape_.ropes ? (kHeads + 2 * kKvHeads) * shape_.head_dim : 272; }
  int64_t head_stride() const { return int64_t{shape_.head_dim} << kBlockShift; }

  RmsNormArgs<Bf16> norm() {
    return {.hidden = hidden_->at(Place::kDevice),
            .ld_hidden = shape_.depth,
            .weight = norm_->at(Place::kDevice),
            .out = normed_->at(Place::kDevice),
            .ld_out = shape_.depth,
            .rows = shape_.rows,
            .width = shape_.depth,
            .eps = kEps};
  }
  GemmArgs product(Place p) {
    return {.a = a_->at(p),
            .lda = shape_.depth,
            .b = b_->at(p),
            .ldb = shape_.depth,
            .d = d_->at(p),
            .ldd = columns(),
            .output = GemmOutput::kBf16,
            .is_gated = !shape_.ropes,
            .row_end = shape_.rows,
            .columns = columns(),
            .depth = shape_.depth};
  }
  RopeArgs<Bf16> rope(Place p) {
    return {.batch = {.sequences = sequences_->at(p),
                      .positions = positions_->at(p),
                      .block_tables = tables_->at(p),
                      .block_table_stride = kTableStride},
            .qkv = d_->at(p),
            .ld_qkv = columns(),
            .bias = shape_.has_bias ? bias_->at(p) : nullptr,
            .rotary = rotary_->at(p),
            .q = q_->at(p),
            .ld_q = kHeads * shape_.head_dim,
            .cache = {keys_->at(p), values_->at(p), head_stride() * kKvHeads, shape_.head_dim,
                      head_stride(), kBlockShift},
            .q_scale = 0.125f,
            .eps = kEps,
            .rows = shape_.rows,
            .heads = kHeads,
            .kv_heads = kKvHeads,
            .head_dim = shape_.head_dim,
            .turning = shape_.head_dim};
  }
  FusedProduct fused(Place p) {
    FusedProduct out{product(p)};
    if (shape_.norms)
      out.norm = {hidden_->at(p), shape_.depth, norm_->at(p), kEps};
    if (shape_.ropes)
      out.rope = rope(p);
    return out;
  }

  void test(const Shape& shape) {
    make(shape);
    expect_kernel([&](cudaStream_t stream) { return launch_fused(fused(Place::kDevice), stream); },
                  [&] { fake_kernels::fused(fused(Place::kHost)); });
#ifndef FP_GPU_DOUBLE  // its loops are not those kernels
    expect_the_bits_of_three();
#endif
  }

  // Operands that only one of both writes hold NaNs in the other.
  void expect_the_bits_of_three() {
    const auto one = run([&](cudaStream_t s) { return launch_fused(fused(Place::kDevice), s); });
    const auto three = run([&](cudaStream_t s) {
      GemmArgs product = this->product(Place::kDevice);
      cudaError_t code = cudaSuccess;
      if (shape_.norms) {
        code = launch_rms_norm(norm(), s);
        product.a = normed_->at(Place::kDevice);
      }
      if (code == cudaSuccess)
        code = launch_gemm(product, GemmTile::kFewRows, s);
      if (code == cudaSuccess && shape_.ropes)
        code = launch_rope(rope(Place::kDevice), s);
      return code;
    });
    constexpr size_t kNormed = 9;  // in the order of make()
    constexpr size_t kD = 10;
    for (size_t i = 0; i < one.size(); ++i) {
      if (i == kNormed || (i == kD && shape_.ropes))
        continue;
      EXPECT_TRUE(one[i] == three[i]) << "operand " << i;
    }
  }

  Shape shape_;
  Array<float>*hidden_ = nullptr, *norm_ = nullptr, *bias_ = nullptr, *rotary_ = nullptr;
  Array<Bf16>*a_ = nullptr, *b_ = nullptr, *normed_ = nullptr, *d_ = nullptr, *q_ = nullptr,
  *keys_ = nullptr, *values_ = nullptr;
  Array<int32_t>*sequences_ = nullptr, *positions_ = nullptr, *tables_ = nullptr;
};

TEST_F(Fused, NormsAndTurnsInEveryHeadSize) {
  for (const int32_t head_dim : {64, 96, 128, 256}) {
    for (const bool has_bias : {false, true})
      test({.head_dim = head_dim, .has_bias = has_bias});
  }
}
TEST_F(Fused, NormsBeforeAGate) {
  for (const int32_t rows : {1, 2})
    test({.rows = rows, .depth = 4096, .ropes = false});
}
TEST_F(Fused, TurnsUpToEightRows) {
  for (const int32_t rows : {1, 5, 8})
    test({.rows = rows, .norms = false});
}

}  // namespace
}  // namespace flowprefill::testing
