// few_rows_body() with norm and rope fused, on the host: the bits of the three kernels one after
// another, for every fusion, rows of padding among them.
#include "devices/cuda/kernels/fused_product.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "devices/cuda/kernels/gemm_few_rows_body.h"
#include "devices/cuda/kernels/rope_body.h"
#include "devices/cuda/kernels/row_bodies.h"
#include "simt.h"

namespace flowprefill {
namespace {

constexpr int32_t kHeads = 3;
constexpr int32_t kKvHeads = 1;
constexpr int32_t kBlockShift = 2;
constexpr int32_t kTable = 3;  // blocks of a sequence
constexpr int32_t kRowsBefore = 1;

struct Case {
  int32_t rows = 2;
  int32_t depth = 200;
  int32_t head_dim = 32;
  bool norms = true;
  bool ropes = true;
  bool has_bias = false;  // that the rope adds
  bool is_gated = false;  // where nothing turns
};

std::vector<float> normals(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> out(count);
  for (float& value : out)
    value = normal(random);
  return out;
}

std::vector<Bf16> halves(size_t count, uint32_t seed) {
  std::vector<Bf16> out;
  for (const float value : normals(count, seed))
    out.push_back(to_bf16(value));
  return out;
}

// What one way of computing it has written.
struct Outputs {
  std::vector<Bf16> d, q, keys, values;
  bool operator==(const Outputs&) const = default;
};

class Layer {
 public:
  explicit Layer(const Case& of)
      : of_(of),
        columns_(of.ropes ? (kHeads + 2 * kKvHeads) * of.head_dim : 96),
        rows_(of.rows + kRowsBefore) {
    const auto rows = static_cast<size_t>(rows_);
    hidden_ = normals(rows * size_t(of.depth + 4), 1);
    norm_ = normals(size_t(of.depth), 2);
    b_ = halves(size_t(columns_) * size_t(of.depth), 3);
    a_ = halves(rows * size_t(of.depth), 4);
    bias_ = normals(size_t(columns_), 5);
    rotary_ = normals(rows * size_t(of.head_dim), 6);
    for (int32_t i = 0; i < rows_; ++i) {
      sequences_.push_back(i == 1 ? 0 : i + 1);  // the second of several rows is padding
      positions_.push_back((7 * i) % (kTable << kBlockShift));
    }
    for (int32_t i = 0; i < rows_ * kTable; ++i)
      tables_.push_back(rows_ * kTable - 1 - i);
  }

  Outputs apart() {
    clear();
    GemmArgs product = this->product();
    std::vector<Bf16> normed(static_cast<size_t>(rows_ * of_.depth));
    if (of_.norms) {
      const RmsNormArgs<Bf16> norm{.hidden = hidden_.data(),
                                   .ld_hidden = of_.depth + 4,
                                   .weight = norm_.data(),
                                   .out = normed.data(),
                                   .ld_out = of_.depth,
                                   .rows = rows_,
                                   .width = of_.depth,
                                   .eps = kEps};
      simt::launch({.x = rows_, .threads = kFewRowsThreads, .shared_bytes = 32},
                   [&](const simt::Thread& t) { rms_norm_body(t, norm); });
      product.a = normed.data();
    }
    run<false, false>({product});
    if (of_.ropes) {
      const RopeArgs<Bf16> rope = this->rope();
      simt::launch({.x = rope.rows, .y = 2, .threads = 128, .overlaps = true},
                   [&](const simt::Thread& t) { rope_body(t, rope); });
    }
    return outputs();
  }

  Outputs fused() {
    clear();
    FusedProduct args{product()};
    if (of_.norms)
      args.norm = {hidden_.data(), of_.depth + 4, norm_.data(), kEps};
    if (of_.ropes)
      args.rope = rope();
    check(args);
    if (of_.norms && of_.ropes)
      run<true, true>(args);
    else if (of_.norms)
      run<true, false>(args);
    else
      run<false, true>(args);
    return outputs();
  }

  GemmArgs product() {
    return {.a = a_.data(),
            .lda = of_.depth,
            .b = b_.data(),
            .ldb = of_.depth,
            .d = d_.data(),
            .ldd = columns_,
            .output = GemmOutput::kBf16,
            .is_gated = of_.is_gated,
            .row_begin = kRowsBefore,
            .row_end = rows_,
            .columns = columns_,
            .depth = of_.depth};
  }

  RopeArgs<Bf16> rope() {
    const int64_t token = of_.head_dim;
    const int64_t head = token << kBlockShift;
    return {.batch = {.sequences = sequences_.data(),
                      .positions = positions_.data(),
                      .block_tables = tables_.data(),
                      .block_table_stride = kTable},
            .qkv = d_.data() + kRowsBefore * columns_,
            .ld_qkv = columns_,
            .bias = of_.has_bias ? bias_.data() : nullptr,
            .rotary = rotary_.data(),
            .q = q_.data(),
            .ld_q = kHeads * of_.head_dim,
            .cache = {keys_.data(), values_.data(), kKvHeads * head, token, head, kBlockShift},
            .q_scale = 0.37f,
            .eps = kEps,
            .rows = of_.rows,
            .heads = kHeads,
            .kv_heads = kKvHeads,
            .head_dim = of_.head_dim,
            .turning = of_.head_dim};
  }

 private:
  static constexpr float kEps = 1e-5f;

  void clear() {
    const Bf16 nothing = to_bf16(-7.0f);
    d_.assign(static_cast<size_t>(rows_ * columns_), nothing);
    q_.assign(static_cast<size_t>(rows_ * kHeads * of_.head_dim), nothing);
    const auto cached = static_cast<size_t>((rows_ * kTable) << kBlockShift);
    keys_.assign(cached * size_t(kKvHeads * of_.head_dim), nothing);
    values_ = keys_;
  }

  // Where heads are turned, what lies between is no output.
  Outputs outputs() const { return {of_.ropes ? std::vector<Bf16>() : d_, q_, keys_, values_}; }

  // Fewer blocks than units of columns, so that some take several.
  template <bool kNorms, bool kRopes>
  static void run(const FusedProduct& args) {
    using Form = FewRowsForm<1>;
    const simt::Grid grid{
        .x = 3,
        .threads = kFewRowsThreads,
        .shared_bytes = Form::kSharedBytes + (kNorms ? normed_bytes(args.product) : 0),
        .overlaps = true};
    simt::launch(grid,
                 [&](const simt::Thread& t) { few_rows_body<1, Bf16, kNorms, kRopes>(t, args); });
  }

  const Case of_;
  const int32_t columns_;
  const int32_t rows_;
  std::vector<float> hidden_, norm_, bias_, rotary_;
  std::vector<Bf16> a_, b_, d_, q_, keys_, values_;
  std::vector<int32_t> sequences_, positions_, tables_;
};

void expect_same(const Case& of) {
  Layer layer(of);
  const Outputs apart = layer.apart();
  EXPECT_TRUE(layer.fused() == apart)
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
  layer.apart();
  const FusedProduct good{.product = layer.product(), .rope = layer.rope()};
  EXPECT_NO_THROW(check(good));
  FusedProduct bad = good;
  bad.product.row_end = kRowsBefore + 9;
  expect_refused(bad, "rows");
  bad = good;
  bad.rope.rows = 1;
  expect_refused(bad, "rope.rows");
  bad = good;
  bad.rope.turning = 16;
  expect_refused(bad, "head_dim");
  const std::vector<float> hidden(static_cast<size_t>(20000 * 3));
  bad = {.product = layer.product(), .norm = {hidden.data(), 20000, hidden.data(), 1e-5f}};
  bad.product.depth = 20000;
  bad.product.ldb = 20000;
  expect_refused(bad, "rows");
  bad = {.product = layer.product(), .norm = {hidden.data(), 100, hidden.data(), 1e-5f}};
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
