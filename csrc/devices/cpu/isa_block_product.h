// Multiplies a few rows by strips of quantised blocks as they are: what a decode step waits for is
// that they arrive. Included by row_kernels.isa.cc only.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "devices/cpu/block_formats.h"
#include "devices/cpu/isa_attention.h"
#include "devices/cpu/isa_blocks.h"
#include "devices/cpu/row_kernels.h"

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

// Whether pairs of T are multiplied natively.
#ifdef __AVX512BF16__
template <typename T>
constexpr bool kHasPairs = sizeof(T) == sizeof(Bf16);
#else
template <typename T>
constexpr bool kHasPairs = false;
#endif

// A row's sums have one order, however many rows are multiplied with it.
#ifdef __clang__
#pragma clang fp reassociate(off)
#else
#pragma GCC push_options
#pragma GCC optimize("no-associative-math")
#endif

// Sum of a few rows times one half of a group, lanes (column, parity).
template <BlockFormat kFormat, int kRows>
FP_INLINE void add_half(const uint8_t* group, int half, const float* a, int64_t lda,
                        Floats (&first)[kRows], Floats (&second)[kRows]) {
  const HalfGroup<kFormat> quants(group, half);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const Floats q0 = quants.template quants<false>(j);
    const Floats q1 = quants.template quants<true>(j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      double pair;  // depths 2j and 2j + 1, for every column
      std::memcpy(&pair, a + r * lda + 16 * half + 2 * j, sizeof pair);
      using Pairs = double __attribute__((vector_size(64)));
      const Pairs pairs = Pairs{} + pair;
      const Floats both = load_vector<Floats>(&pairs);
      first[r] += q0 * both;
      second[r] += q1 * both;
    }
  }
}

template <BlockFormat kFormat, int kRows>
FP_INLINE void scale_and_add(const ScaleAndMinimum& by, const float* sums, int64_t ld_sums,
                             const Floats (&first)[kRows], const Floats (&second)[kRows],
                             Floats (&total)[kRows]) {
  for (int r = 0; r < kRows; ++r) {
    const Floats even = __builtin_shufflevector(first[r], second[r], 0, 2, 4, 6, 8, 10, 12, 14, 16,
                                                18, 20, 22, 24, 26, 28, 30);
    const Floats odd = __builtin_shufflevector(first[r], second[r], 1, 3, 5, 7, 9, 11, 13, 15, 17,
                                               19, 21, 23, 25, 27, 29, 31);
    total[r] += by.scale * (even + odd);
    if constexpr (BlockScales<kFormat>::kSubtracts) {
      total[r] -= by.minimum * sums[r * ld_sums];
    }
  }
}

template <BlockFormat kFormat, int kRows>
void multiply_strip_rows(const uint8_t* strip, int64_t depth, const FewRows& rows, int first_row,
                         float* out) {
  constexpr BlockLayout kLayout = layout_of(kFormat);
  constexpr int kGroups = kLayout.depth / kGroupDepth;
  const int64_t lda = rows.stride / static_cast<int64_t>(sizeof(float));
  const float* a = static_cast<const float*>(rows.rows) + first_row * lda;
  constexpr int kSums = kFormat == BlockFormat::kQ6K ? 2 : 1;  // of a group
  const float* sums = a + depth + (kSums == 2 ? depth / kGroupDepth : 0);
  Floats total[kRows] = {};
  for (int64_t k = 0; k < depth; k += kLayout.depth, strip += kLayout.bytes() * kStripColumns) {
    const BlockScales<kFormat> scales(strip);
    const uint8_t* group = strip + kLayout.scale_bytes * kStripColumns;
    for (int g = 0; g < kGroups; ++g, group += kLayout.group_bytes() * kStripColumns) {
      const int64_t at = k + g * kGroupDepth;
      const float* sums_here = sums + at / kGroupDepth * kSums;
      ask_ahead<kFormat>(group);
      Floats first[kRows] = {};
      Floats second[kRows] = {};
      add_half<kFormat, kRows>(group, 0, a + at, lda, first, second);
      if constexpr (kFormat == BlockFormat::kQ6K) {
        scale_and_add<kFormat, kRows>(scales.of(g, 0), sums_here, lda, first, second, total);
        for (int r = 0; r < kRows; ++r)
          first[r] = second[r] = Floats{};
        add_half<kFormat, kRows>(group, 1, a + at, lda, first, second);
        scale_and_add<kFormat, kRows>(scales.of(g, 1), sums_here + 1, lda, first, second, total);
      } else {
        add_half<kFormat, kRows>(group, 1, a + at, lda, first, second);
        scale_and_add<kFormat, kRows>(scales.of(g, 0), sums_here, lda, first, second, total);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    std::memcpy(out + r * kStripColumns, &total[r], sizeof total[r]);
}

#ifdef __AVX512BF16__
// bf16 of the integers from kFirst on, all of which it holds exactly.
template <int kFirst>
FP_INLINE __m512i integers_as_bf16() {
  alignas(64) static constexpr auto kTable = [] {
    std::array<uint16_t, 32> table{};
    for (int i = 0; i < 32; ++i)
      table[static_cast<size_t>(i)] =
          static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(kFirst + i)) >> 16);
    return table;
  }();
  return _mm512_load_si512(kTable.data());
}

// Half words of 16 words, one half of each: those of `a`, then those of `b`.
template <int kHalf>
FP_INLINE __m512i half_words(__m512i a, __m512i b) {
  alignas(64) static constexpr auto kIndex = [] {
    std::array<uint16_t, 32> index{};
    for (int i = 0; i < 32; ++i)
      index[static_cast<size_t>(i)] = static_cast<uint16_t>(2 * i + kHalf);
    return index;
  }();
  return _mm512_permutex2var_epi16(a, _mm512_load_si512(kIndex.data()), b);
}

// The quants of one half of a group as bf16, not scaled: half words (column, parity).
template <BlockFormat kFormat>
struct PairsOfHalf {
  static constexpr BlockLayout kLayout = layout_of(kFormat);
  using HalfWords = uint16_t __attribute__((vector_size(64)));

  FP_INLINE PairsOfHalf(const uint8_t* group, int half) : bytes(group), at(half) {
    if constexpr (kFormat != BlockFormat::kQ8_0) {
      const __m512i first = _mm512_loadu_si512(group + 128 * half);
      const __m512i second = _mm512_loadu_si512(group + 128 * half + 64);
      low[0] = (HalfWords)half_words<0>(first, second);
      low[1] = (HalfWords)half_words<1>(first, second);
    }
    const uint8_t* above = group + kLayout.low_bytes * kStripColumns;
    if constexpr (kLayout.high_bytes != 0) {
      const __m512i words = _mm512_loadu_si512(above + (kLayout.high_bytes == 8 ? 64 * half : 0));
      const __m256i first = _mm512_cvtepi32_epi16(words);
      const __m256i second = _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16));
      high = (HalfWords)_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
      if (kLayout.high_bytes == 4 && half == 1)
        high >>= 8;
    }
  }

  // Of depths 2j and 2j + 1, for all 16 columns.
  FP_INLINE __m512bh pairs(int j) const {
    if constexpr (kFormat == BlockFormat::kQ8_0) {
      const auto* from = reinterpret_cast<const __m128i*>(bytes + (8 * at + j) * 32);
      const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from)));
      const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from + 1)));
      return _mm512_cvtne2ps_pbh(second, first);
    }
    HalfWords index = low[j / 4] >> (4 * (j % 4)) & 15;
    if constexpr (kLayout.high_bytes == 4)
      index |= (high >> j & 1) << 4;
    if constexpr (kLayout.high_bytes == 8) {
      index |= (high >> (2 * j) & 3) << 4;
      return (__m512bh)_mm512_permutex2var_epi16(integers_as_bf16<0>(), (__m512i)index,
                                                 integers_as_bf16<32>());
    }
    return (__m512bh)_mm512_permutexvar_epi16((__m512i)index, integers_as_bf16<0>());
  }

  const uint8_t* bytes;
  int at;
  HalfWords low[2];
  HalfWords high;
};

// Two sums for each row, so that one row alone need not wait for every addition.
template <BlockFormat kFormat, int kRows>
FP_INLINE void add_half(const uint8_t* group, int half, const std::byte* a, int64_t stride,
                        Floats (&even)[kRows], Floats (&odd)[kRows]) {
  const PairsOfHalf<kFormat> quants(group, half);
  a += 16 * half * sizeof(Bf16);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    const __m512bh pairs = quants.pairs(j);
    Floats(&sums)[kRows] = j % 2 == 0 ? even : odd;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh both =
          pair_of(reinterpret_cast<const Bf16*>(a + r * stride + 2 * j * sizeof(Bf16)));
      sums[r] = (Floats)_mm512_dpbf16_ps((__m512)sums[r], pairs, both);
    }
  }
}

template <BlockFormat kFormat, int kRows>
FP_INLINE void scale_and_add(const ScaleAndMinimum& by, const std::byte* sums, int64_t stride,
                             Floats (&even)[kRows], Floats (&odd)[kRows], Floats (&total)[kRows]) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    total[r] += by.scale * (even[r] + odd[r]);
    if constexpr (BlockScales<kFormat>::kSubtracts) {
      const auto* sum = reinterpret_cast<const float*>(sums + r * stride);
      total[r] -= by.minimum * *sum;
    }
    even[r] = odd[r] = Floats{};
  }
}

template <BlockFormat kFormat, int kRows>
void multiply_strip_pairs(const uint8_t* strip, int64_t depth, const FewRows& rows, int first_row,
                          float* out) {
  constexpr BlockLayout kLayout = layout_of(kFormat);
  constexpr int kGroups = kLayout.depth / kGroupDepth;
  const std::byte* a = static_cast<const std::byte*>(rows.rows) + first_row * rows.stride;
  constexpr int kSums = kFormat == BlockFormat::kQ6K ? 2 : 1;  // of a group
  const std::byte* sums = a + (depth + (kSums == 2 ? depth / kGroupDepth : 0)) * sizeof(float);
  Floats total[kRows] = {};
  Floats even[kRows] = {};
  Floats odd[kRows] = {};
  for (int64_t k = 0; k < depth; k += kLayout.depth, strip += kLayout.bytes() * kStripColumns) {
    const BlockScales<kFormat> scales(strip);
    const uint8_t* group = strip + kLayout.scale_bytes * kStripColumns;
    for (int g = 0; g < kGroups; ++g, group += kLayout.group_bytes() * kStripColumns) {
      ask_ahead<kFormat>(group);
      add_half<kFormat, kRows>(group, 0, a, rows.stride, even, odd);
      if constexpr (kFormat == BlockFormat::kQ6K)
        scale_and_add<kFormat, kRows>(scales.of(g, 0), sums, rows.stride, even, odd, total);
      add_half<kFormat, kRows>(group, 1, a, rows.stride, even, odd);
      scale_and_add<kFormat, kRows>(scales.of(g, kSums - 1), sums + (kSums - 1) * sizeof(float),
                                    rows.stride, even, odd, total);
      a += kGroupDepth * sizeof(Bf16);
      sums += kSums * sizeof(float);
    }
  }
  for (int r = 0; r < kRows; ++r)
    std::memcpy(out + r * kStripColumns, &total[r], sizeof total[r]);
}
#endif

#ifndef __clang__
#pragma GCC pop_options
#endif

template <BlockFormat kFormat, typename T, int kRows>
void multiply_rows_of(const uint8_t* strip, int64_t depth, const FewRows& rows, int first,
                      float* out) {
  out += first * kStripColumns;
#ifdef __AVX512BF16__
  if constexpr (sizeof(T) == sizeof(Bf16))
    return multiply_strip_pairs<kFormat, kRows>(strip, depth, rows, first, out);
#endif
  multiply_strip_rows<kFormat, kRows>(strip, depth, rows, first, out);
}

template <BlockFormat kFormat, typename T>
void multiply_strip(const uint8_t* strip, int64_t depth, const FewRows& rows, float* out) {
  int r = 0;
  if constexpr (kHasPairs<T>) {
    for (; r + 8 <= rows.count; r += 8)
      multiply_rows_of<kFormat, T, 8>(strip, depth, rows, r, out);
  }
  for (; r + 4 <= rows.count; r += 4)
    multiply_rows_of<kFormat, T, 4>(strip, depth, rows, r, out);
  for (; r + 2 <= rows.count; r += 2)
    multiply_rows_of<kFormat, T, 2>(strip, depth, rows, r, out);
  if (r < rows.count)
    multiply_rows_of<kFormat, T, 1>(strip, depth, rows, r, out);
}

template <typename T>
void multiply_few(BlockFormat format, const uint8_t* strip, int64_t depth, const FewRows& rows,
                  float* out) {
#define FP_MULTIPLY(f) multiply_strip<f, T>(strip, depth, rows, out)
  FP_EACH_FORMAT(FP_MULTIPLY)
#undef FP_MULTIPLY
}

// See FewRows. The values stay bf16 where the processor multiplies it.
template <typename T>
void prepare_few(const T* a, int64_t depth, void* row) {
  auto* of_groups = static_cast<float*>(row) + depth;
  auto* of_halves = of_groups + depth / kGroupDepth;
  for (int64_t k = 0; k < depth; k += kGroupDepth / 2) {
    float sum = 0.0f;
    for (int i = 0; i < kGroupDepth / 2; ++i) {
      const float value = load(a[k + i]);
      if constexpr (!kHasPairs<T>)
        static_cast<float*>(row)[k + i] = value;
      sum += value;
    }
    *of_halves++ = sum;
    if (k % kGroupDepth != 0)
      *of_groups++ = of_halves[-2] + sum;
  }
  if constexpr (kHasPairs<T>)
    std::memcpy(row, a, static_cast<size_t>(depth) * sizeof(T));
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
