// A part of a layer that a product of few rows fuses: its shape, its operands, and the arguments of
// the kernels that compute it, together or one after another. For the tests of that product, of its
// body on the host and of its kernel on a GPU.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "devices/cuda/kernels/fused_product.h"

namespace flowprefill {

struct FusedShape {
  int32_t rows = 2;
  int32_t depth = 200;
  int32_t head_dim = 32;
  bool norms = true;
  bool ropes = true;
  bool has_bias = false;  // that the rope adds
  bool is_gated = false;  // where nothing turns

  static constexpr int32_t kHeads = 6;
  static constexpr int32_t kKvHeads = 2;
  static constexpr int32_t kBlockShift = 2;
  static constexpr int32_t kTable = 3;  // blocks of each sequence, which is a row
  static constexpr int32_t kRowsBefore = 1;
  static constexpr float kEps = 1e-5f;

  int32_t row_end() const { return kRowsBefore + rows; }
  int32_t ld_hidden() const { return depth + 4; }
  int32_t columns() const { return ropes ? (kHeads + 2 * kKvHeads) * head_dim : 272; }
  int64_t head_stride() const { return int64_t{head_dim} << kBlockShift; }
};

// Held<T>: an array of T, or what leads to one.
template <template <typename> typename Held>
struct FusedOperands {
  Held<float> hidden, norm;
  Held<Bf16> a, b;
  Held<float> bias, rotary;
  Held<int32_t> sequences, positions, tables;
  Held<Bf16> normed, d;  // of the kernels alone: the fused one keeps them to itself
  Held<Bf16> q, keys, values;
};

// add(name, values) -> Held<T>, in the order of the members. Outputs are NaN.
template <template <typename> typename Held, typename Add>
FusedOperands<Held> add_operands(const FusedShape& s, Add add) {
  std::mt19937 random(7);
  const auto normals = [&](int64_t count, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> out(static_cast<size_t>(count));
    for (float& value : out)
      value = normal(random);
    return out;
  };
  const auto halves = [&](int64_t count, float scale = 1.0f) {
    std::vector<Bf16> out;
    for (const float value : normals(count, scale))
      out.push_back(to_bf16(value));
    return out;
  };
  const auto outputs = [](int64_t count) {
    return std::vector<Bf16>(static_cast<size_t>(count), Bf16{0x7fc1});
  };
  std::vector<int32_t> sequences, positions, tables;
  for (int32_t row = 0; row < s.rows; ++row) {
    sequences.push_back(row == 1 ? 0 : row + 1);  // the second of several rows is padding
    positions.push_back(7 * row % (s.kTable << s.kBlockShift));
  }
  for (int32_t i = s.rows * s.kTable; i-- > 0;)
    tables.push_back(i);
  const int64_t cached = s.rows * s.kTable * s.kKvHeads * s.head_stride();
  return {.hidden = add("hidden", normals(s.row_end() * s.ld_hidden())),
          .norm = add("norm", normals(s.depth)),
          .a = add("a", halves(s.row_end() * s.depth)),
          .b = add("b", halves(s.columns() * s.depth, 0.1f)),
          .bias = add("bias", normals(s.columns())),
          .rotary = add("rotary", normals(s.rows * s.head_dim)),
          .sequences = add("sequences", sequences),
          .positions = add("positions", positions),
          .tables = add("tables", tables),
          .normed = add("normed", outputs(s.row_end() * s.depth)),
          .d = add("d", outputs(s.row_end() * s.columns())),
          .q = add("q", outputs(s.rows * s.kHeads * s.head_dim)),
          .keys = add("keys", outputs(cached)),
          .values = add("values", outputs(cached))};
}

// at(held) -> the address of its first element, where the kernels run.
template <typename Operands, typename At>
class FusedArgs {
 public:
  FusedArgs(const FusedShape& shape, Operands& operands, At at)
      : s_(shape), o_(operands), at_(at) {}

  RmsNormArgs<Bf16> norm() const {
    return {.hidden = at_(o_.hidden),
            .ld_hidden = s_.ld_hidden(),
            .weight = at_(o_.norm),
            .out = at_(o_.normed),
            .ld_out = s_.depth,
            .rows = s_.row_end(),
            .width = s_.depth,
            .eps = s_.kEps};
  }
  GemmArgs product() const {
    return {.a = at_(o_.a),
            .lda = s_.depth,
            .b = at_(o_.b),
            .ldb = s_.depth,
            .d = at_(o_.d),
            .ldd = s_.columns(),
            .output = GemmOutput::kBf16,
            .is_gated = s_.is_gated,
            .row_begin = s_.kRowsBefore,
            .row_end = s_.row_end(),
            .columns = s_.columns(),
            .depth = s_.depth};
  }
  RopeArgs<Bf16> rope() const {
    return {.batch = {.sequences = at_(o_.sequences),
                      .positions = at_(o_.positions),
                      .block_tables = at_(o_.tables),
                      .block_table_stride = s_.kTable},
            .qkv = at_(o_.d) + s_.kRowsBefore * s_.columns(),
            .ld_qkv = s_.columns(),
            .bias = s_.has_bias ? at_(o_.bias) : nullptr,
            .rotary = at_(o_.rotary),
            .q = at_(o_.q),
            .ld_q = s_.kHeads * s_.head_dim,
            .cache = {at_(o_.keys), at_(o_.values), s_.kKvHeads * s_.head_stride(), s_.head_dim,
                      s_.head_stride(), s_.kBlockShift},
            .q_scale = 0.37f,
            .eps = s_.kEps,
            .rows = s_.rows,
            .heads = s_.kHeads,
            .kv_heads = s_.kKvHeads,
            .head_dim = s_.head_dim,
            .turning = s_.head_dim};
  }
  FusedProduct fused() const {
    FusedProduct out{product()};
    if (s_.norms)
      out.norm = {at_(o_.hidden), s_.ld_hidden(), at_(o_.norm), s_.kEps};
    if (s_.ropes)
      out.rope = rope();
    return out;
  }

  // What fused() has to equal: each called with its arguments.
  template <typename Norm, typename Product, typename Rope>
  void one_after_another(Norm run_norm, Product run_product, Rope run_rope) const {
    GemmArgs product = this->product();
    if (s_.norms) {
      run_norm(norm());
      product.a = at_(o_.normed);
    }
    run_product(product);
    if (s_.ropes)
      run_rope(rope());
  }

 private:
  const FusedShape& s_;
  Operands& o_;
  const At at_;
};

}  // namespace flowprefill
