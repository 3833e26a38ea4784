// few_rows_body() with norm and rope fused, on the host: the bits of the three kernels one after
// another, for every fusion, rows of padding among them.
#include "devices/cuda/kernels/fused_product.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "devices/cuda/kernels/gemm_few_rows_body.h"
#include "devices/cuda/kernels/rope_body.h"
#include "devices/cuda/kernels/row_bodies.h"
#include "fused_layer.h"
#include "simt.h"

namespace flowprefill {
namespace {

template <typename T>
using Vector = std::vector<T>;

// Fewer blocks than units of columns, so that some take several.
template <bool kNorms, bool kRopes>
void run(const FusedProduct& args) {
  using Form = FewRowsForm<1>;
  const simt::Grid grid{
      .x = 3,
      .threads = kFewRowsThreads,
      .shared_bytes = Form::kSharedBytes + (kNorms ? normed_bytes(args.product) : 0),
      .overlaps = true};
  simt::launch(grid,
               [&](const simt::Thread& t) { few_rows_body<1, Bf16, kNorms, kRopes>(t, args); });
}

void run_norm(const RmsNormArgs<Bf16>& args) {
  simt::launch({.x = args.rows, .threads = kFewRowsThreads, .shared_bytes = 32},
               [&](const simt::Thread& t) { rms_norm_body(t, args); });
}

void run_product(const GemmArgs& args) {
  run<false, false>({args});
}

void run_rope(const RopeArgs<Bf16>& args) {
  const int32_t heads = args.heads + 2 * args.kv_heads;
  simt::launch({.x = args.rows, .y = (heads + 3) / 4, .threads = 128, .overlaps = true},
               [&](const simt::Thread& t) { rope_body(t, args); });
}

void run_fused(const FusedProduct& args) {
  check(args);
  if (args.has_norm() && args.has_rope())
    run<true, true>(args);
  else if (args.has_norm())
    run<true, false>(args);
  else
    run<false, true>(args);
}

class Layer {
 public:
  explicit Layer(const FusedShape& shape)
      : shape_(shape),
        operands_(add_operands<Vector>(shape, [](const char*, auto values) { return values; })) {}

  auto args() {
    return FusedArgs(shape_, operands_, [](auto& values) { return values.data(); });
  }
  // Where heads are turned, what lies between is no output.
  bool has_outputs_of(const Layer& other) const {
    const FusedOperands<Vector>& o = other.operands_;
    return (shape_.ropes || operands_.d == o.d) && operands_.q == o.q && operands_.keys == o.keys &&
           operands_.values == o.values;
  }

 private:
  const FusedShape shape_;
  FusedOperands<Vector> operands_;
};

void expect_same(const FusedShape& of) {
  Layer fused(of), apart(of);
  run_fused(fused.args().fused());
  apart.args().one_after_another(run_norm, run_product, run_rope);
  EXPECT_TRUE(fused.has_outputs_of(apart))
      << "rows " << of.rows << ", depth " << of.depth << ", head_dim " << of.head_dim << ", norms "
      << of.norms << ", ropes " << of.ropes << ", bias " << of.has_bias;
}

TEST(FusedProduct, HasTheBitsOfTheThreeKernels) {
  for (const int32_t head_dim : {16, 32, 64}) {
    for (const bool norms : {false, true}) {
      for (const bool has_bias : {false, true})
        expect_same({.rows = 2, .head_dim = head_dim, .norms = norms, .has_bias = has_bias});
    }
  }
}

TEST(FusedProduct, HasThemWithAGate) {
  for (const bool is_gated : {false, true})
    expect_same({.rows = 1, .ropes = false, .is_gated = is_gated});
}

TEST(FusedProduct, TurnsUpToEightRows) {
  for (const int32_t rows : {1, 5, 8})
    expect_same({.rows = rows, .norms = false});
}

TEST(FusedProduct, NormsRowsOfAnyWidth) {
  for (const int32_t depth : {8, 64, 1032, 4104})
    expect_same({.rows = 1, .depth = depth});
}

// What is refused, by its field.
void expect_refused(const FusedProduct& args, const std::string& field) {
  try {
    check(args);
    FAIL() << field;
  } catch (const std::invalid_argument& error) {
    EXPECT_EQ(std::string(error.what()).substr(0, field.size()), field);
  }
}

TEST(FusedProduct, RefusesWhatTheKernelDoesNotDo) {
  Layer layer({});
  const FusedProduct good{.product = layer.args().product(), .rope = layer.args().rope()};
  EXPECT_NO_THROW(check(good));
  FusedProduct bad = good;
  bad.product.row_end = FusedShape::kRowsBefore + 9;
  expect_refused(bad, "rows");
  bad = good;
  bad.rope.rows = 1;
  expect_refused(bad, "rope.rows");
  bad = good;
  bad.rope.turning = 16;
  expect_refused(bad, "head_dim");
  const std::vector<float> hidden(static_cast<size_t>(20000 * 3));
  bad = {.product = good.product, .norm = {hidden.data(), 20000, hidden.data(), 1e-5f}};
  bad.product.depth = 20000;
  bad.product.ldb = 20000;
  expect_refused(bad, "rows");
  bad = {.product = good.product, .norm = {hidden.data(), 100, hidden.data(), 1e-5f}};
  expect_refused(bad, "ld_hidden");
}

TEST(FusedProduct, NormsTwoRowsOfALargeModel) {
  GemmArgs product{.row_end = 2, .columns = 4096, .depth = 8192};
  EXPECT_FALSE(can_fuse_norm(product));
  product.row_end = 1;
  EXPECT_TRUE(can_fuse_norm(product));
  product = {.row_end = 2, .columns = 4096, .depth = 4096};
  EXPECT_TRUE(can_fuse_norm(product));
  product.row_end = 3;
  EXPECT_FALSE(can_fuse_norm(product));
}

}  // namespace
}  // namespace flowprefill
