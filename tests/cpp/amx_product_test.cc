// Tests of csrc/devices/cpu/amx_product.h on tiles of plain loops, which refuse what a processor
// does not execute, and on the processor's if it has some; whole numbers, so that sums are exact.
#include "devices/cpu/amx.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "bf16.h"
#include "devices/cpu/isa.h"

namespace flowprefill {
namespace {

// What the manual says of tileloadd, tilestored and tdpbf16ps, but for rounding.
struct PlainTiles {
  using Tile = std::array<std::array<char, 64>, 16>;
  static inline AmxShapes shapes;
  static inline std::array<Tile, 8> tiles;

  static void shape(const AmxShapes& wanted) {
    shapes = wanted;
    tiles = {};
  }
  template <int kTile>
  static void zero() {
    tiles[kTile] = {};
  }
  template <int kTile>
  static void load(const void* from, int64_t row_bytes) {
    tiles[kTile] = {};
    for (int r = 0; r < shapes.rows[kTile]; ++r) {
      std::memcpy(tiles[kTile][static_cast<size_t>(r)].data(),
                  static_cast<const char*>(from) + r * row_bytes, shapes.row_bytes[kTile]);
    }
  }
  template <int kTile>
  static void store(void* to, int64_t row_bytes) {
    for (int r = 0; r < shapes.rows[kTile]; ++r) {
      std::memcpy(static_cast<char*>(to) + r * row_bytes,
                  tiles[kTile][static_cast<size_t>(r)].data(), shapes.row_bytes[kTile]);
    }
  }
  template <typename T, int kTile>
  static T at(int row, int i) {
    T value;
    std::memcpy(&value, tiles[kTile][static_cast<size_t>(row)].data() + i * int{sizeof(T)},
                sizeof value);
    return value;
  }
  template <int kSum, int kA, int kB>
  static void multiply() {
    if (shapes.rows[kSum] != shapes.rows[kA] || shapes.row_bytes[kA] != shapes.rows[kB] * 4 ||
        shapes.row_bytes[kSum] != shapes.row_bytes[kB])
      throw std::logic_error("tiles that do not fit each other");
    for (int m = 0; m < shapes.rows[kSum]; ++m) {
      for (int n = 0; n < shapes.row_bytes[kSum] / 4; ++n) {
        float sum = at<float, kSum>(m, n);
        for (int k = 0; k < shapes.rows[kB]; ++k) {
          sum += widened(at<Bf16, kA>(m, 2 * k)) * widened(at<Bf16, kB>(k, 2 * n));
          sum += widened(at<Bf16, kA>(m, 2 * k + 1)) * widened(at<Bf16, kB>(k, 2 * n + 1));
        }
        std::memcpy(tiles[kSum][static_cast<size_t>(m)].data() + n * 4, &sum, sizeof sum);
      }
    }
  }
};

using Multiply = void (*)(const Product<Bf16>&, AmxTerms);

// Rows of a and of c lie apart, but behind the last ones is nothing: a sanitizer sees what is read
// or written there.
void expect_product(Multiply multiply, int64_t rows, int64_t n, int64_t k, size_t num_terms) {
  SCOPED_TRACE(testing::Message() << rows << " rows, n " << n << ", k " << k << ", terms "
                                  << num_terms);
  const int64_t lda = k + 6;
  const int64_t ldc = n + 3;
  const bool add = num_terms != 1;
  std::mt19937 random(5);
  const auto numbers = [&](int64_t count) {
    std::vector<Bf16> values(static_cast<size_t>(count));
    for (Bf16& value : values)
      value = narrowed(static_cast<float>(random() % 9) - 4.0f);
    return values;
  };
  std::vector<std::vector<Bf16>> of_terms;
  std::vector<AmxTerm> terms;
  for (size_t i = 0; i < num_terms; ++i) {
    of_terms.push_back(numbers((rows - 1) * lda + k));
    of_terms.push_back(numbers(k * n));
    terms.push_back({of_terms[2 * i].data(), of_terms[2 * i + 1].data()});
  }
  std::vector<float> c(static_cast<size_t>((rows - 1) * ldc + n), 7.0f);
  std::vector<float> expected = c;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      float sum = add ? 7.0f : 0.0f;
      for (const AmxTerm& term : terms) {
        for (int64_t d = 0; d < k; ++d)
          sum += widened(term.a[r * lda + d]) * widened(term.b[(d / 2 * n + i) * 2 + d % 2]);
      }
      expected[static_cast<size_t>(r * ldc + i)] = sum;
    }
  }
  const Product<Bf16> form{.rows = rows,
                           .n = n,
                           .k = k,
                           .lda = lda,
                           .ldb = n,
                           .ldc = ldc,
                           .add = add,
                           .a = nullptr,
                           .b = nullptr,
                           .c = c.data()};
  multiply(form, terms);
  EXPECT_EQ(c, expected);
}

void expect_products(Multiply multiply) {
  for (const int64_t rows : {1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 100}) {
    for (const int64_t n : {16, 32, 48, 64}) {
      for (const int64_t k : {32, 64, 576}) {
        for (const size_t num_terms : {0, 1, 3})
          expect_product(multiply, rows, n, k, num_terms);
      }
    }
  }
}

TEST(AmxProduct, OnPlainTiles) {
  expect_products(multiply_amx<PlainTiles>);
}

TEST(AmxProduct, OnTilesOfTheProcessor) {
  if (isa() != Isa::kAmx)
    GTEST_SKIP() << "it has none, or this process may not use them";
  expect_products(multiply_by_amx);
  std::thread([] {  // has tiles of its own
    expect_products(multiply_by_amx);
    release_amx();
    expect_products(multiply_by_amx);
  })
      .join();
  expect_products(multiply_by_amx);
  release_amx();
}

TEST(AmxProduct, TakesWholeTilesOfColumnsAndDepth) {
  EXPECT_TRUE(fits_amx(64, 576));
  EXPECT_TRUE(fits_amx(16, 32));
  EXPECT_FALSE(fits_amx(8, 32));
  EXPECT_FALSE(fits_amx(16, 48));
}

}  // namespace
}  // namespace flowprefill
