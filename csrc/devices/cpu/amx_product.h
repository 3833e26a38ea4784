// The micro-kernel of bf16 products on AMX tiles, on whatever computes like them: amx.cc gives it
// the processor's, a test plain loops.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "devices/cpu/row_kernels.h"

namespace flowprefill {

inline constexpr int kAmxRows = 16;
inline constexpr int kAmxColumns = 16;
inline constexpr int kAmxDepth = 32;  // of one instruction

// The shapes of eight tiles, as the processor reads them (palette 1). 0 to 3 are sums: 0 and 1 of
// upper rows, 2 and 3 of the sixteen rows below them. 4 and 5 are these rows of a, 6 and 7 two
// sixteens of columns of b.
struct alignas(64) AmxShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  std::array<uint8_t, 14> reserved{};
  std::array<uint16_t, 16> row_bytes{64, 64, 64, 64, 64, 64, 64, 64};
  std::array<uint8_t, 16> rows{16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(AmxShapes) == 64);

// By the number of upper rows; 0: all sixteen.
inline constexpr auto kAmxShapes = [] {
  std::array<AmxShapes, kAmxRows> shapes;
  for (uint8_t rows = 1; rows < kAmxRows; ++rows)
    shapes[rows].rows = {rows, rows, 16, 16, rows, 16, 16, 16};
  return shapes;
}();

inline bool fits_amx(int64_t n, int64_t k) {
  return n % kAmxColumns == 0 && k % kAmxDepth == 0;
}

// One of several products whose sum is wanted: all have the form of one Product.
struct AmxTerm {
  const Bf16* a;
  const Bf16* b;
};
using AmxTerms = std::span<const AmxTerm>;

// kRows by kColumns tiles of sums.
template <typename Tiles, int kRows, int kColumns>
class AmxBlock {
 public:
  AmxBlock(const Product<Bf16>& p, int64_t row, int64_t column)
      : p_(p),
        in_a_(row * p.lda),
        in_b_(2 * column),
        c_(p.c + row * p.ldc + column),
        row_bytes_of_a_(p.lda * 2),
        row_bytes_of_b_(p.ldb * 4),
        row_bytes_of_c_(p.ldc * 4) {}

  void multiply(AmxTerms terms) {
    begin();
    for (const AmxTerm& term : terms) {
      const Bf16* a = term.a + in_a_;
      const Bf16* b = term.b + in_b_;
      for (int64_t k = 0; k < p_.k; k += kAmxDepth, a += kAmxDepth, b += kAmxDepth * p_.ldb)
        add_products(a, b);
    }
    end();
  }

 private:
  static constexpr bool kHasLower = kRows == 2;
  static constexpr bool kHasRight = kColumns == 2;

  template <int kTile>
  void begin_tile(const float* from) {
    if (p_.add)
      Tiles::template load<kTile>(from, row_bytes_of_c_);
    else
      Tiles::template zero<kTile>();
  }
  float* lower() const { return c_ + kAmxRows * p_.ldc; }

  void begin() {
    begin_tile<0>(c_);
    if constexpr (kHasRight)
      begin_tile<1>(c_ + kAmxColumns);
    if constexpr (kHasLower)
      begin_tile<2>(lower());
    if constexpr (kHasLower && kHasRight)
      begin_tile<3>(lower() + kAmxColumns);
  }

  void add_products(const Bf16* a, const Bf16* b) {
    Tiles::template load<6>(b, row_bytes_of_b_);
    Tiles::template load<4>(a, row_bytes_of_a_);
    Tiles::template multiply<0, 4, 6>();
    if constexpr (kHasRight) {
      Tiles::template load<7>(b + 2 * kAmxColumns, row_bytes_of_b_);
      Tiles::template multiply<1, 4, 7>();
    }
    if constexpr (kHasLower) {
      Tiles::template load<5>(a + kAmxRows * p_.lda, row_bytes_of_a_);
      Tiles::template multiply<2, 5, 6>();
    }
    if constexpr (kHasLower && kHasRight)
      Tiles::template multiply<3, 5, 7>();
  }

  void end() const {
    Tiles::template store<0>(c_, row_bytes_of_c_);
    if constexpr (kHasRight)
      Tiles::template store<1>(c_ + kAmxColumns, row_bytes_of_c_);
    if constexpr (kHasLower)
      Tiles::template store<2>(lower(), row_bytes_of_c_);
    if constexpr (kHasLower && kHasRight)
      Tiles::template store<3>(lower() + kAmxColumns, row_bytes_of_c_);
  }

  const Product<Bf16>& p_;
  const int64_t in_a_;
  const int64_t in_b_;
  float* const c_;
  const int64_t row_bytes_of_a_;
  const int64_t row_bytes_of_b_;
  const int64_t row_bytes_of_c_;
};

template <typename Tiles, int kRows>
void multiply_amx_rows(const Product<Bf16>& p, AmxTerms terms, int64_t row) {
  int64_t column = 0;
  for (; column + 2 * kAmxColumns <= p.n; column += 2 * kAmxColumns)
    AmxBlock<Tiles, kRows, 2>(p, row, column).multiply(terms);
  if (column < p.n)
    AmxBlock<Tiles, kRows, 1>(p, row, column).multiply(terms);
}

// The sum of the terms, which take the place of a and b. Any rows; n and k as fits_amx() wants
// them.
template <typename Tiles>
void multiply_amx(const Product<Bf16>& p, AmxTerms terms) {
  const int64_t whole = p.rows / kAmxRows * kAmxRows;
  int64_t row = 0;
  if (whole > 0)
    Tiles::shape(kAmxShapes[0]);
  for (; row + 2 * kAmxRows <= whole; row += 2 * kAmxRows)
    multiply_amx_rows<Tiles, 2>(p, terms, row);
  if (row < whole)
    multiply_amx_rows<Tiles, 1>(p, terms, row);
  if (whole == p.rows)
    return;
  Tiles::shape(kAmxShapes[static_cast<size_t>(p.rows - whole)]);
  multiply_amx_rows<Tiles, 1>(p, terms, whole);
}

}  // namespace flowprefill
