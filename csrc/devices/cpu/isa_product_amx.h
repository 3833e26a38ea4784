// The micro-kernel of products on AMX tiles, of bf16 and of bytes, by whatever computes like tiles:
// row_kernels.isa.cc gives it the processor's, a test plain loops. Included by these two only.
#pragma once

#include <cstdint>

#include "devices/cpu/isa_math.h"
#include "devices/cpu/isa_tiles.h"
#include "devices/cpu/row_kernels.h"

#if defined(__AVX512BF16__) && defined(__x86_64__)
namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

// So much of the depth of 32 columns at once stays in L1 (36 of 48 KiB) while all rows pass over
// it.
constexpr int64_t kPieceBytes = 18 * kTileBytes;
constexpr int64_t kMostLinesAhead = 4;  // asked for in one step: more hold up what is read now

template <typename Tiles, bool kOfBytes>
class TileMultiplier {
 public:
  explicit TileMultiplier(const TileProduct& product)
      : p_(product), ahead_(static_cast<const char*>(product.ahead)) {
    const int64_t steps = p_.depth_bytes / kTileBytes * ((p_.columns + kPair - 1) / kPair) *
                          ((p_.rows + kPair - 1) / kPair);
    const int64_t lines = ahead_ == nullptr ? 0 : p_.depth_bytes * p_.columns / kTileBytes;
    const int64_t each = (lines + steps - 1) / steps;
    lines_ = each < kMostLinesAhead ? each : kMostLinesAhead;
  }

  void run() {
    const int64_t whole = p_.rows / kPair * kPair;
    if (whole > 0) {
      Tiles::begin(kPair);
      multiply_rows<true>(0, whole);
    }
    if (const auto rest = static_cast<int>(p_.rows - whole); rest > 0) {
      Tiles::begin(rest);
      if (rest > kSquare)
        multiply_rows<true>(whole, p_.rows);
      else
        multiply_rows<false>(whole, p_.rows);
    }
    Tiles::end();
  }

 private:
  // Sums run over the depth in order whatever the pieces are, so these change no bit.
  template <bool kHasLower>
  void multiply_rows(int64_t begin, int64_t end) {
    const int64_t pieces = (p_.depth_bytes + kPieceBytes - 1) / kPieceBytes;
    const int64_t steps = p_.depth_bytes / kTileBytes;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t first = steps * piece / pieces * kTileBytes;
      const int64_t last = steps * (piece + 1) / pieces * kTileBytes;
      for (int64_t column = 0; column < p_.columns; column += kPair) {
        for (int64_t row = begin; row < end; row += kPair) {
          if (column + kSquare < p_.columns)
            multiply_square<kHasLower, true>(row, column, first, last);
          else
            multiply_square<kHasLower, false>(row, column, first, last);
        }
      }
    }
  }

  template <bool kHasLower, bool kHasRight>
  void multiply_square(int64_t row, int64_t column, int64_t first, int64_t last) {
    const char* const upper = static_cast<const char*>(p_.a) + row * p_.lda;
    const char* const lower = upper + kSquare * p_.lda;
    const char* const left = static_cast<const char*>(p_.b) + column / kSquare * p_.strip_bytes;
    const char* const right = left + p_.strip_bytes;
    char* const c = static_cast<char*>(p_.c) + (row * p_.ldc + column) * 4;
    using Sums = TileSums<Tiles, kHasLower, kHasRight>;
    if (p_.add || first > 0)
      Sums::load(c, p_.ldc * 4);
    else
      Sums::clear();
    for (int64_t k = first; k < last; k += kTileBytes) {
      ask_ahead();
      Tiles::template stream<4>(upper + k, p_.lda);
      if constexpr (kHasLower)
        Tiles::template stream<5>(lower + k, p_.lda);
      Tiles::template load<6>(left + k * kSquare, kTileBytes);
      if constexpr (kHasRight)
        Tiles::template load<7>(right + k * kSquare, kTileBytes);
      Sums::template add<kOfBytes>();
    }
    Sums::store(c, p_.ldc * 4);
  }

  void ask_ahead() {
    for (int64_t i = 0; i < lines_; ++i, ahead_ += kTileBytes)
      __builtin_prefetch(ahead_, 0, 2);
  }

  const TileProduct& p_;
  const char* ahead_;
  int64_t lines_;  // asked for in a step
};

template <bool kOfBytes>
void multiply_by_tiles(const TileProduct& product) {
  TileMultiplier<ProcessorTiles, kOfBytes>(product).run();
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
#endif
