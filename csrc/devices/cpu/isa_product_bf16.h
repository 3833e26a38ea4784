// The micro-kernel of bf16 products for AVX-512 BF16: it asks for weights ahead, for which products
// of few rows wait. Included by row_kernels.isa.cc only.
#pragma once

#ifdef __AVX512BF16__
#include <cstdint>

#include "devices/cpu/isa_attention_pieces.h"
#include "devices/cpu/row_kernels.h"

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

// A product of few rows is as fast as its weights arrive: so far ahead they are asked for.
constexpr int kAheadBytes = 8192;
constexpr int64_t kLineBytes = 64;

// c is added at the end, not first: so ATen's micro-kernel rounds, whose bits these are. kAhead:
// lines from `ahead` on that are asked for at each pair.
template <int kRows, int kVectors, int kAhead>
void multiply_tile(const Product<Bf16>& p, const Bf16* a, const Bf16* b, float* c,
                   const char* ahead) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = _mm512_setzero_ps();
  }
  // What the sums are added to is another operator's work, on any core: its way here takes as long
  // as the first pairs.
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      _mm_prefetch(reinterpret_cast<const char*>(c + r * p.ldc + v * kLanes), _MM_HINT_T0);
  }
  for (int64_t pair = 0; pair < p.k / 2; ++pair) {
    const Bf16* row = b + 2 * pair * p.ldb;
    __m512bh right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      right[v] = pairs_of(row + 2 * v * kLanes);
      _mm_prefetch(reinterpret_cast<const char*>(row + 2 * v * kLanes) + kAheadBytes, _MM_HINT_T0);
    }
#pragma GCC unroll 2
    for (int line = 0; line < kAhead; ++line)
      _mm_prefetch(ahead + (pair * kAhead + line) * kLineBytes, _MM_HINT_T1);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = pair_of(a + r * p.lda + 2 * pair);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* out = c + r * p.ldc + v * kLanes;
      _mm512_storeu_ps(out, p.add ? _mm512_add_ps(sums[r][v], _mm512_loadu_ps(out)) : sums[r][v]);
    }
  }
}

template <int kRows, int kAhead>
void multiply_columns(const Product<Bf16>& p, int64_t row, const char* ahead) {
  const Bf16* a = p.a + row * p.lda;
  float* c = p.c + row * p.ldc;
  int64_t column = 0;
  for (; column + kTileVectors * kLanes <= p.n; column += kTileVectors * kLanes)
    multiply_tile<kRows, kTileVectors, kAhead>(p, a, p.b + 2 * column, c + column, ahead);
  for (; column < p.n; column += kLanes)
    multiply_tile<kRows, 1, 0>(p, a, p.b + 2 * column, c + column, nullptr);
}

template <int kAhead>
void multiply_rows(const Product<Bf16>& p, int64_t row, int64_t rows, const char* ahead) {
  switch (rows) {
    case 6:
      return multiply_columns<6, kAhead>(p, row, ahead);
    case 5:
      return multiply_columns<5, kAhead>(p, row, ahead);
    case 4:
      return multiply_columns<4, kAhead>(p, row, ahead);
    case 3:
      return multiply_columns<3, kAhead>(p, row, ahead);
    case 2:
      return multiply_columns<2, kAhead>(p, row, ahead);
    default:
      return multiply_columns<1, kAhead>(p, row, ahead);
  }
}

// The block is passed over once for at most kTileRows rows. From the first pass on it is in cache;
// memory is kept busy by asking for the next block then, some lines at each pair of every pass. So
// passes have equally many rows: one that is over too soon would wait for what it has asked for.
inline void multiply(const Product<Bf16>& p) {
  int64_t passes = (p.rows + kTileRows - 1) / kTileRows;
  const auto* ahead = reinterpret_cast<const char*>(p.ahead);
  const bool is_whole = p.n == kTileVectors * kLanes && passes > 1 && ahead != nullptr;
  const char* const end = is_whole ? ahead + p.k * p.n * static_cast<int64_t>(sizeof(Bf16)) : ahead;
  const int64_t lines = passes >= kTileVectors ? 1 : 2;  // at a pair, of kTileVectors
  for (int64_t row = 0; row < p.rows; --passes) {
    const int64_t rows = (p.rows - row + passes - 1) / passes;
    if (ahead == end) {
      multiply_rows<0>(p, row, rows, nullptr);
    } else {
      if (lines == 1)
        multiply_rows<1>(p, row, rows, ahead);
      else
        multiply_rows<2>(p, row, rows, ahead);
      ahead += p.k / 2 * lines * kLineBytes;
    }
    row += rows;
  }
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
#endif
