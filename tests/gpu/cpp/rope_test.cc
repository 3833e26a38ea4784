// Rope with bias, head norms and the write into the paged cache, on the device.
#include <cmath>

#include "device_test.h"

namespace flowprefill::testing {
namespace {

constexpr int32_t kRows = 29;
constexpr int32_t kSequences = 3;
constexpr int32_t kBlockShift = 3;
constexpr int32_t kTableStride = 5;  // blocks of each sequence
constexpr int32_t kBlocks = kSequences * kTableStride;

struct Shape {
  int32_t heads;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t turning;
  bool has_bias;
  bool has_norms;
  bool norms_rows = false;
};

class Rope : public DeviceTest {
 protected:
  template <typename In>
  void test(const Shape& s) {
    forget();
    const int32_t columns = (s.heads + 2 * s.kv_heads) * s.head_dim;
    std::vector<In> values(static_cast<size_t>(kRows * (columns + 8)));
    for (In& value : values)
      store(std::normal_distribution<float>()(random_), &value);
    auto& qkv = add("qkv", std::move(values));
    auto& bias = add("bias", normals(static_cast<size_t>(columns)));
    const int32_t q_normed = s.norms_rows ? s.heads : 1;
    const int32_t k_normed = s.norms_rows ? s.kv_heads : 1;
    auto& q_norm = add("q_norm", normals(static_cast<size_t>(q_normed * s.head_dim)));
    auto& k_norm = add("k_norm", normals(static_cast<size_t>(k_normed * s.head_dim)));
    auto& rotary = add("rotary", angles(s.turning));
    auto& of_row = add("sequences", sequences());
    auto& at_row = add("positions", positions());
    auto& tables = add("block_tables", permutation(kBlocks));
    const int64_t head_stride = int64_t{s.head_dim} << kBlockShift;
    const int64_t block_stride = head_stride * s.kv_heads;
    const int32_t ld_q = s.heads * s.head_dim + 8;
    auto& q = add("q", filled_halves(static_cast<size_t>((kRows + 1) * ld_q)));
    auto& keys = add("keys", filled_halves(static_cast<size_t>(kBlocks * block_stride)));
    auto& cached = add("values", filled_halves(static_cast<size_t>(kBlocks * block_stride)));
    // A pair's halves may cancel: what is left errs by a share of them, not of itself.
    for (auto* out : {&q, &keys, &cached})
      out->allow(kOneStep, 2e-5);
    const auto args = [&](Place p) {
      return RopeArgs<In>{
          .batch = {.sequences = of_row.at(p),
                    .positions = at_row.at(p),
                    .block_tables = tables.at(p),
                    .block_table_stride = kTableStride},
          .qkv = qkv.at(p),
          .ld_qkv = columns + 8,
          .bias = s.has_bias ? bias.at(p) : nullptr,
          .q_norm = s.has_norms ? q_norm.at(p) : nullptr,
          .k_norm = s.has_norms ? k_norm.at(p) : nullptr,
          .rotary = rotary.at(p),
          .q = q.at(p),
          .ld_q = ld_q,
          .cache = {keys.at(p), cached.at(p), block_stride, s.head_dim, head_stride, kBlockShift},
          .q_scale = 1.4427f / std::sqrt(static_cast<float>(s.head_dim)),
          .eps = 1e-6f,
          .rows = kRows,
          .heads = s.heads,
          .kv_heads = s.kv_heads,
          .head_dim = s.head_dim,
          .turning = s.turning,
          .norms_rows = s.norms_rows};
    };
    expect_kernel([&](cudaStream_t stream) { return launch_rope(args(Place::kDevice), stream); },
                  [&] { fake_kernels::rope(args(Place::kHost)); });
  }

  // Rows of each sequence side by side, the last three are padding.
  static std::vector<int32_t> sequences() {
    std::vector<int32_t> out;
    for (int32_t row = 0; row < kRows; ++row)
      out.push_back(row >= kRows - 3 ? 0 : 1 + row % kSequences);
    return out;
  }
  static std::vector<int32_t> positions() {
    std::vector<int32_t> out;
    for (int32_t row = 0; row < kRows; ++row)
      out.push_back(row >= kRows - 3 ? 0 : 4 * (row % kSequences) + row / kSequences);
    return out;
  }
  std::vector<float> angles(int32_t turning) {
    const int32_t half = turning / 2;
    std::vector<float> out(static_cast<size_t>(kRows * turning));
    for (int32_t row = 0; row < kRows; ++row) {
      for (int32_t i = 0; i < half; ++i) {
        const auto angle = static_cast<float>(integer(0, 6283)) / 1000.0f;
        out[static_cast<size_t>(row * turning + i)] = std::cos(angle);
        out[static_cast<size_t>(row * turning + half + i)] = std::sin(angle);
      }
    }
    return out;
  }
};

TEST_F(Rope, OfHalvesInEveryHeadSize) {
  for (const int32_t head_dim : {64, 96, 128, 256})
    test<Bf16>({.heads = 9,
                .kv_heads = 3,
                .head_dim = head_dim,
                .turning = head_dim,
                .has_bias = false,
                .has_norms = false});
}
TEST_F(Rope, OfFloatsWithBiasAndNorms) {
  for (const int32_t head_dim : {64, 128})
    test<float>({.heads = 4,
                 .kv_heads = 2,
                 .head_dim = head_dim,
                 .turning = head_dim,
                 .has_bias = true,
                 .has_norms = true});
}
TEST_F(Rope, OfHalvesWithNormsWithoutGrouping) {
  test<Bf16>({.heads = 2,
              .kv_heads = 2,
              .head_dim = 128,
              .turning = 128,
              .has_bias = true,
              .has_norms = true});
}
TEST_F(Rope, OfAPartOfEachHead) {
  for (const int32_t turning : {4, 64, 96})
    test<Bf16>({.heads = 4,
                .kv_heads = 2,
                .head_dim = 128,
                .turning = turning,
                .has_bias = true,
                .has_norms = false});
}
TEST_F(Rope, WithNormsOverAllHeads) {
  for (const int32_t head_dim : {64, 128, 256})
    test<Bf16>({.heads = 6,
                .kv_heads = 2,
                .head_dim = head_dim,
                .turning = head_dim,
                .has_bias = true,
                .has_norms = true,
                .norms_rows = true});
}

}  // namespace
}  // namespace flowprefill::testing
