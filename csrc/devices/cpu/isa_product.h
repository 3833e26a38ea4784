// The micro-kernel of float products: a tile of rows and vectors of sums in registers, with the
// compiler's vectors, for every instruction set. Included by row_kernels.isa.cc only.
#pragma once

#include <cstdint>
#include <cstring>

#include "devices/cpu/row_kernels.h"

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

// Sums in registers: rows times vectors, with room for a row of operands. 32 registers, or 16.
#if defined(__AVX512F__)
constexpr int kProductLanes = 16;
constexpr int kProductVectors = 4;
#elif defined(__AVX2__)
constexpr int kProductLanes = 8;
constexpr int kProductVectors = 2;
#elif defined(__aarch64__)
constexpr int kProductLanes = 4;
constexpr int kProductVectors = 4;
#else
constexpr int kProductLanes = 4;
constexpr int kProductVectors = 2;
#endif
constexpr int kProductRows = 6;

using ProductVector = float __attribute__((vector_size(4 * kProductLanes)));

inline ProductVector vector_at(const float* p) {
  ProductVector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// Rows [0, kRows), columns [0, kVectors * kProductLanes) from where a, b and c point.
template <int kRows, int kVectors>
void multiply_tile(const Product<float>& p, const float* a, const float* b, float* c) {
  ProductVector sums[kRows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = p.add ? vector_at(c + r * p.ldc + v * kProductLanes) : ProductVector{};
  }
  for (int64_t k = 0; k < p.k; ++k) {
    ProductVector right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      right[v] = vector_at(b + k * p.ldb + v * kProductLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const float left = a[r * p.lda + k];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      std::memcpy(c + r * p.ldc + v * kProductLanes, &sums[r][v], sizeof sums[r][v]);
  }
}

// Columns that fill no vector: model sizes are hardly ever so.
template <int kRows>
void multiply_columns(const Product<float>& p, const float* a, const float* b, float* c,
                      int64_t columns) {
  for (int r = 0; r < kRows; ++r) {
    for (int64_t i = 0; i < columns; ++i) {
      float sum = p.add ? c[r * p.ldc + i] : 0.0f;
      for (int64_t k = 0; k < p.k; ++k)
        sum += a[r * p.lda + k] * b[k * p.ldb + i];
      c[r * p.ldc + i] = sum;
    }
  }
}

template <int kRows>
void multiply_rows(const Product<float>& p, int64_t row) {
  const float* a = p.a + row * p.lda;
  float* c = p.c + row * p.ldc;
  // One row alone has the registers for more columns, and more sums to keep the adders busy.
  constexpr int kVectors = kRows == 1 && kProductVectors == 2 ? 8 : kProductVectors;
  constexpr int64_t kTile = int64_t{kVectors} * kProductLanes;
  int64_t column = 0;
  for (; column + kTile <= p.n; column += kTile)
    multiply_tile<kRows, kVectors>(p, a, p.b + column, c + column);
  for (; column + kProductLanes <= p.n; column += kProductLanes)
    multiply_tile<kRows, 1>(p, a, p.b + column, c + column);
  multiply_columns<kRows>(p, a, p.b + column, c + column, p.n - column);
}

inline void multiply(const Product<float>& p) {
  int64_t row = 0;
  for (; row + kProductRows <= p.rows; row += kProductRows)
    multiply_rows<kProductRows>(p, row);
  switch (p.rows - row) {
    case 5:
      return multiply_rows<5>(p, row);
    case 4:
      return multiply_rows<4>(p, row);
    case 3:
      return multiply_rows<3>(p, row);
    case 2:
      return multiply_rows<2>(p, row);
    case 1:
      return multiply_rows<1>(p, row);
    default:
      return;
  }
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
