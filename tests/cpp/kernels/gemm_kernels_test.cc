// The CUTLASS kernels for sm_80 as a whole on the host: CUTLASS's copies, pipeline, register layout
// and epilogue with our tiles, arguments and callbacks, thread by thread, against sums in double.
#include "cutlass_on_host.h"  // first

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "devices/cuda/kernels/gemm_gated_tiles.h"
#include "devices/cuda/kernels/gemm_tiles.h"
#include "reference.h"

namespace flowprefill {
namespace {

// What no result is; as bf16 and as float.
constexpr Bf16 kUntouched = 0x7fc1;

double of(float value) {
  return value;
}
double of(Bf16 value) {
  return widen(value);
}

template <class Tile>
void run(const GemmArgs& args, uint32_t seed) {
  using Kernel = typename Tile::Kernel;
  check(args);
  typename Kernel::Params params(Tile::arguments(args), /*device_sms=*/108, /*sm_occupancy=*/1);
  const dim3 grid = params.get_grid_dims();
  ASSERT_EQ(grid.z, 1u);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = {x, y, 0};
      simt::launch({.threads = Kernel::kThreadCount,
                    .shared_bytes = sizeof(typename Kernel::SharedStorage),
                    .seed = seed++},
                   [&](const simt::Thread& t) {
                     simt::become(t);
                     Kernel()(params, *t.shared<typename Kernel::SharedStorage>());
                   });
    }
  }
}

// A slice of a product whose rows, columns and depth fill no tile.
template <class Tile>
class Product {
 public:
  using Output = typename Tile::Output;

  // The second of two kinds has bias, residual and scale, or is GELU with bias.
  Product(uint32_t seed, bool is_gated, bool is_second)
      : is_gated_(is_gated),
        has_bias_(is_second),
        adds_to_d_(is_second && !is_gated),
        is_gelu_(is_second && is_gated),
        scale_(adds_to_d_ ? 0.25f : 1.0f),
        random_(seed) {
    fill(&a_, (kRowEnd + 1) * kLda);
    fill(&b_, kColumns * kLdb);
    for (int i = 0; i < kColumns; ++i)
      bias_.push_back(normal_(random_));
    for (int64_t i = 0; i < (kRowEnd + 1) * ldd(); ++i)
      d_.push_back(adds_to_d_ ? Output(to_bf16_or_float(normal_(random_))) : untouched());
    before_ = d_;
  }

  void test(uint32_t seed) {
    run<Tile>({.a = a_.data(),
               .lda = kLda,
               .b = b_.data(),
               .ldb = kLdb,
               .bias = has_bias_ ? bias_.data() : nullptr,
               .d = d_.data(),
               .ldd = ldd(),
               .output = sizeof(Output) == 4 ? GemmOutput::kFloat : GemmOutput::kBf16,
               .adds_to_d = adds_to_d_,
               .is_gated = is_gated_,
               .is_gelu = is_gelu_,
               .scale = scale_,
               .row_begin = kRowBegin,
               .row_end = kRowEnd,
               .columns = kColumns,
               .depth = kDepth},
              seed);
    for (int row = 0; row <= kRowEnd; ++row) {
      for (int column = 0; column < ldd(); ++column)
        ASSERT_NO_FATAL_FAILURE(test_at(row, column)) << "row " << row << ", column " << column;
    }
  }

 private:
  static constexpr int kRowBegin = 7;
  static constexpr int kRowEnd = kRowBegin + Tile::Block::kM + Tile::Block::kM / 4 + 3;
  static constexpr int kColumns = Tile::Block::kN + 48;
  static constexpr int kDepth = 5 * Tile::Block::kK + 8;
  static constexpr int64_t kLda = kDepth + 16;
  static constexpr int64_t kLdb = kDepth + 8;

  int d_columns() const { return is_gated_ ? kColumns / 2 : kColumns; }
  int64_t ldd() const { return d_columns() + 8; }

  static Output to_bf16_or_float(float value) {
    if constexpr (sizeof(Output) == 2) {
      return to_bf16(value);
    } else {
      return value;
    }
  }
  static Output untouched() {
    if constexpr (sizeof(Output) == 2) {
      return kUntouched;
    } else {
      return std::nanf("");
    }
  }
  static bool is_same(Output x, Output y) { return std::memcmp(&x, &y, sizeof x) == 0; }

  void fill(std::vector<Bf16>* matrix, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      matrix->push_back(to_bf16(normal_(random_)));
  }

  // The sum of column `column` of the product with its bias, and of the absolute products.
  std::pair<double, double> sum(int row, int column) const {
    double sum = has_bias_ ? bias_[static_cast<size_t>(column)] : 0.0;
    double size = std::abs(sum);
    for (int k = 0; k < kDepth; ++k) {
      const double product = scale_ * of(a_[static_cast<size_t>(row * kLda + k)]) *
                             of(b_[static_cast<size_t>(column * kLdb + k)]);
      sum += product;
      size += std::abs(product);
    }
    return {sum, size};
  }

  void test_at(int row, int column) const {
    const auto at = static_cast<size_t>(row * ldd() + column);
    if (row < kRowBegin || row >= kRowEnd || column >= d_columns()) {
      ASSERT_TRUE(is_same(d_[at], before_[at])) << "written outside";
      return;
    }
    const double rounding = sizeof(Output) == 2 ? 1.0 / 256 : 1e-7;
    if (is_gated_) {
      const auto [gate, gate_size] = sum(row, 2 * column);
      const auto [up, up_size] = sum(row, 2 * column + 1);
      const double want = (is_gelu_ ? reference::gelu(gate) : reference::silu(gate)) * up;
      const double slack = 1e-6 * (gate_size * (std::abs(up) + 1) + up_size * (std::abs(gate) + 1));
      ASSERT_NEAR(of(d_[at]), want, std::abs(want) * rounding + slack);
    } else {
      const auto [product, size] = sum(row, column);
      const double want = product + (adds_to_d_ ? of(before_[at]) : 0.0);
      ASSERT_NEAR(of(d_[at]), want, std::abs(want) * rounding + 1e-6 * size);
    }
  }

  const bool is_gated_, has_bias_, adds_to_d_, is_gelu_;
  const float scale_;
  std::mt19937 random_;
  std::normal_distribution<float> normal_;
  std::vector<Bf16> a_, b_;
  std::vector<float> bias_;
  std::vector<Output> d_, before_;
};

template <class Tile>
void test_plain(uint32_t seed) {
  Product<Tile>(seed, false, false).test(seed);
  Product<Tile>(seed + 1, false, true).test(seed);
}
template <class Tile>
void test_gated(uint32_t seed) {
  Product<Tile>(seed, true, false).test(seed);
  Product<Tile>(seed + 1, true, true).test(seed);
}

TEST(GemmKernels, Of64x64) {
  test_plain<Plain64x64<float>>(1);
  test_plain<Plain64x64<Bf16>>(2);
  test_gated<Gated64x64>(3);
}
TEST(GemmKernels, Of128x128) {
  test_plain<Plain128x128<float>>(4);
  test_plain<Plain128x128<Bf16>>(5);
  test_gated<Gated128x128>(6);
}
TEST(GemmKernels, Of256x128) {
  test_plain<Plain256x128<float>>(7);
  test_plain<Plain256x128<Bf16>>(8);
  test_gated<Gated256x128>(9);
}

}  // namespace
}  // namespace flowprefill
