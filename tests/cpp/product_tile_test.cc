// Tests of csrc/devices/cpu/isa_product_amx.h, on tiles of plain loops and on the processor's if it
// has some: products of bf16 and of bytes against sums written out, whole numbers, so that they are
// exact.
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <random>
#include <vector>

#include "bf16.h"
#include "devices/cpu/isa.h"
#include "devices/cpu/row_kernels.h"
#include "plain_tiles.h"

namespace flowprefill {
namespace {

enum class On { kPlainTiles, kTiles };

struct OfBf16 {
  using Left = Bf16;
  using Right = Bf16;
  using Sum = float;
  static Bf16 small(int value) { return narrowed(static_cast<float>(value - 4)); }
  static float number(Bf16 value) { return widened(value); }
  static auto multiply(On on) {
    return on == On::kTiles ? row_kernels<Bf16>().multiply_by_tiles : multiply_by_plain_tiles;
  }
};

struct OfBytes {
  using Left = uint8_t;
  using Right = int8_t;
  using Sum = int32_t;
  static int small(int value) { return value * 30 - 120; }
  static int32_t number(int value) { return value; }
  static auto multiply(On on) {
    return on == On::kTiles ? row_kernels<Bf16>().multiply_bytes_by_tiles
                            : multiply_bytes_by_plain_tiles;
  }
};

struct Sizes {
  int64_t rows;
  int64_t columns;
  int64_t lines;  // of 64 bytes of depth
};

// Rows of a and of c lie apart, but behind the last ones is nothing: a sanitizer sees what is read
// or written there.
template <typename Of>
class Problem {
 public:
  using Left = typename Of::Left;
  using Right = typename Of::Right;
  using Sum = typename Of::Sum;

  Problem(On on, const Sizes& s) : on_(on), s_(s) {
    std::mt19937 random(5);
    const auto fill = [&](auto& values, int64_t count) {
      values.resize(static_cast<size_t>(count));
      for (auto& value : values)
        value =
            static_cast<std::decay_t<decltype(value)>>(Of::small(static_cast<int>(random() % 9)));
    };
    fill(a_, (s.rows - 1) * lda() + depth());
    fill(b_, depth() * s.columns);
  }

  int64_t ldc() const { return s_.columns + 3; }
  std::vector<Sum> before(int64_t rows) const {
    return std::vector<Sum>(static_cast<size_t>((rows - 1) * ldc() + s_.columns), Sum{7});
  }

  // Rows [begin, end).
  std::vector<Sum> product(int64_t begin, int64_t end, bool add, bool asks_ahead = false) const {
    std::vector<Sum> c = before(end - begin);
    Of::multiply(on_)({.rows = end - begin,
                       .columns = s_.columns,
                       .depth_bytes = s_.lines * 64,
                       .strip_bytes = s_.lines * 64 * kTileColumns,
                       .lda = lda() * int64_t{sizeof(Left)},
                       .ldc = ldc(),
                       .add = add,
                       .a = a_.data() + begin * lda(),
                       .b = b_.data(),
                       .c = c.data(),
                       .ahead = asks_ahead ? b_.data() : nullptr});
    return c;
  }

  std::vector<Sum> expected(bool add) const {
    std::vector<Sum> c = before(s_.rows);
    for (int64_t r = 0; r < s_.rows; ++r) {
      for (int64_t i = 0; i < s_.columns; ++i) {
        Sum& sum = c[static_cast<size_t>(r * ldc() + i)];
        if (!add)
          sum = 0;
        for (int64_t k = 0; k < depth(); ++k)
          sum += Of::number(a_[static_cast<size_t>(r * lda() + k)]) * Of::number(weight(k, i));
      }
    }
    return c;
  }

 private:
  static constexpr int64_t kPacked = 4 / sizeof(Left);

  int64_t depth() const { return s_.lines * 16 * kPacked; }
  int64_t lda() const { return depth() + 6; }
  // Layout: TileProduct.
  Right weight(int64_t k, int64_t column) const {
    const int64_t strip = column / kTileColumns * kTileColumns * depth();
    const int64_t at = (k / kPacked * kTileColumns + column % kTileColumns) * kPacked + k % kPacked;
    return b_[static_cast<size_t>(strip + at)];
  }

  const On on_;
  const Sizes s_;
  std::vector<Left> a_;
  std::vector<Right> b_;
};

// One tile; half a pair of rows, of columns; rows that no sixteen divides; depths in several
// pieces.
constexpr std::array kSizes{Sizes{1, 16, 1},   Sizes{16, 64, 2}, Sizes{17, 48, 3},
                            Sizes{31, 16, 20}, Sizes{32, 32, 1}, Sizes{70, 64, 18},
                            Sizes{45, 80, 37}};

template <typename Of>
void expect_products(On on) {
  for (const Sizes& sizes : kSizes) {
    SCOPED_TRACE(testing::Message() << sizes.rows << " rows, " << sizes.columns << " columns, "
                                    << sizes.lines << " lines");
    const Problem<Of> problem(on, sizes);
    for (const bool add : {false, true})
      ASSERT_EQ(problem.product(0, sizes.rows, add), problem.expected(add));
    ASSERT_EQ(problem.product(0, sizes.rows, false, true), problem.expected(false));
  }
}

class ProductTileTest : public testing::TestWithParam<On> {
 protected:
  void SetUp() override {
    if (row_kernels<Bf16>().attend == nullptr)
      GTEST_SKIP() << "this processor has no AVX-512 BF16";
    if (GetParam() == On::kTiles && isa() != Isa::kAmx)
      GTEST_SKIP() << "it has no tiles, or this process may not use them";
  }
};

TEST_P(ProductTileTest, Bf16IsMultiplied) {
  expect_products<OfBf16>(GetParam());
}

TEST_P(ProductTileTest, BytesAreMultiplied) {
  expect_products<OfBytes>(GetParam());
}

TEST_P(ProductTileTest, ARowHasTheSameBitsWhateverTheOtherRows) {
  constexpr Sizes kAll{39, 48, 40};
  const Problem<OfBf16> problem(GetParam(), kAll);
  const std::vector<float> together = problem.product(0, kAll.rows, true);
  for (int64_t begin = 0; begin < kAll.rows; begin += 5) {
    const int64_t end = std::min(begin + 5, kAll.rows);
    const std::vector<float> apart = problem.product(begin, end, true);
    ASSERT_EQ(std::memcmp(apart.data(), together.data() + begin * problem.ldc(),
                          apart.size() * sizeof(float)),
              0);
  }
}

INSTANTIATE_TEST_SUITE_P(On, ProductTileTest, testing::Values(On::kPlainTiles, On::kTiles),
                         [](const testing::TestParamInfo<On>& info) {
                           return info.param == On::kTiles ? "Tiles" : "PlainTiles";
                         });

}  // namespace
}  // namespace flowprefill
