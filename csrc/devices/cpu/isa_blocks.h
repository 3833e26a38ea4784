// Reads strips of quantised blocks (block_formats.h), and unpacks them for the matrix kernel.
// Included by isa_block_product.h and row_kernels.isa.cc only.
#pragma once

#include <cstdint>
#include <cstring>

#include "devices/cpu/block_formats.h"
#include "devices/cpu/isa_math.h"
#include "devices/cpu/row_kernels.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors wider than registers never leave this file
#endif

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

#define FP_INLINE inline __attribute__((always_inline))

// 16 lanes, on every instruction set: the compiler cuts them to the registers it has.
using Floats = float __attribute__((vector_size(64)));
using Words = int32_t __attribute__((vector_size(64)));
using Fields = uint8_t __attribute__((vector_size(16)));

template <typename V>
FP_INLINE V load_vector(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// 16 halves as floats.
FP_INLINE Floats halves(const uint8_t* from) {
#ifdef __AVX512F__
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  Floats out;
  for (int i = 0; i < kStripColumns; ++i) {
    uint16_t half;
    std::memcpy(&half, from + 2 * i, sizeof half);
    const uint32_t rest = half & 0x7fffu;
    const float value = float_of(rest << 13) * float_of(0x77800000u);  // * 2^112
    const uint32_t bits = rest >= 0x7c00u ? 0x7f800000u | rest << 13 : bits_of(value);
    out[i] = float_of(bits | (half & 0x8000u) << 16);
  }
  return out;
#endif
}
FP_INLINE Floats signed_bytes(const uint8_t* from) {
#ifdef __AVX512F__
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
  Floats out;
  for (int i = 0; i < kStripColumns; ++i)
    out[i] = static_cast<float>(static_cast<int8_t>(from[i]));
  return out;
#endif
}

// Each of 8 columns twice: lanes are (column, parity of the depth). Second: columns 8 to 15.
template <bool kSecond>
FP_INLINE Floats twice(const Floats& v) {
  if constexpr (kSecond)
    return __builtin_shufflevector(v, v, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15,
                                   15);
  return __builtin_shufflevector(v, v, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
}

struct ScaleAndMinimum {
  Floats scale;  // by column
  Floats minimum;
};

// What a block of 16 columns has for all its groups.
template <BlockFormat kFormat>
struct BlockScales {
  static constexpr bool kIsK = kFormat == BlockFormat::kQ4K || kFormat == BlockFormat::kQ5K;
  static constexpr bool kHasMinimum =
      kIsK || kFormat == BlockFormat::kQ4_1 || kFormat == BlockFormat::kQ5_1;
  static constexpr float kOffset = kFormat == BlockFormat::kQ4_0   ? 8.0f
                                   : kFormat == BlockFormat::kQ5_0 ? 16.0f
                                   : kFormat == BlockFormat::kQ6K  ? 32.0f
                                                                   : 0.0f;
  static constexpr bool kSubtracts = kHasMinimum || kOffset != 0.0f;

  FP_INLINE explicit BlockScales(const uint8_t* block) : bytes(block), scale(halves(block)) {
    if constexpr (kHasMinimum)
      minimum = halves(block + 32);
  }

  FP_INLINE ScaleAndMinimum of(int group, int half) const {
    if constexpr (kFormat == BlockFormat::kQ6K) {
      const Floats s = scale * signed_bytes(bytes + 32 + (2 * group + half) * kStripColumns);
      return {s, s * kOffset};
    } else if constexpr (kIsK) {
      return {scale * six_bits(group, 0), minimum * six_bits(group, 4)};
    } else if constexpr (kHasMinimum) {
      return {scale, -minimum};  // which these formats add
    } else {
      return {scale, scale * kOffset};
    }
  }

  // The K formats' packed scales (first 0) and minima (4).
  FP_INLINE Floats six_bits(int group, int first) const {
    const auto field = [&](int i) { return load_vector<Fields>(bytes + 64 + i * kStripColumns); };
    Fields bits = field(first + group % 4);
    if (group < 4) {
      bits &= 63;
    } else {
      const Fields rest = field(4 + group);
      bits = (bits >> 2 & 0x30) | (first == 0 ? rest & 15 : rest >> 4);
    }
    return signed_bytes(reinterpret_cast<const uint8_t*>(&bits));
  }

  const uint8_t* bytes;
  Floats scale;
  Floats minimum;
};

// The quants of one half of a group: of 16 depths and 16 columns, lanes (column, parity).
template <BlockFormat kFormat>
struct HalfGroup {
  static constexpr BlockLayout kLayout = layout_of(kFormat);

  FP_INLINE HalfGroup(const uint8_t* group, int half) : bytes(group), at(half) {
    if constexpr (kFormat != BlockFormat::kQ8_0) {
      first = load_vector<Words>(group + 128 * half);
      second = load_vector<Words>(group + 128 * half + 64);
    }
    const uint8_t* above = group + kLayout.low_bytes * kStripColumns;
    if constexpr (kLayout.high_bytes == 4)
      high = load_vector<Words>(above) >> (8 * half);
    else if constexpr (kLayout.high_bytes == 8)
      high = load_vector<Words>(above + 64 * half);
  }

  // Of depths 2j and 2j + 1; kSecond: of columns 8 to 15.
  template <bool kSecond>
  FP_INLINE Floats quants(int j) const {
    if constexpr (kFormat == BlockFormat::kQ8_0)
      return signed_bytes(bytes + (8 * at + j) * 32 + (kSecond ? 16 : 0));
    Words low = (kSecond ? second : first) >> (4 * j) & 15;
    if constexpr (kLayout.high_bytes == 4)
      low |= (high >> (j + (kSecond ? 16 : 0)) & 1) << 4;
    if constexpr (kLayout.high_bytes == 8)
      low |= (high >> (2 * j + (kSecond ? 16 : 0)) & 3) << 4;
    return __builtin_convertvector(low, Floats);
  }

  const uint8_t* bytes;
  int at;
  Words first;
  Words second;
  Words high;
};

// Lanes (column, parity) of columns 0 to 7 and 8 to 15, as the matrix kernel wants two depths.
FP_INLINE void store_pair(const Floats& first, const Floats& second, Bf16* out, int64_t) {
#ifdef __AVX512BF16__
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  std::memcpy(out, &both, sizeof both);
#else
  for (int i = 0; i < kStripColumns; ++i) {
    store(first[i], out + i);
    store(second[i], out + kStripColumns + i);
  }
#endif
}
FP_INLINE void store_pair(const Floats& first, const Floats& second, float* out, int64_t ld) {
  const Floats even = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20,
                                              22, 24, 26, 28, 30);
  const Floats odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21,
                                             23, 25, 27, 29, 31);
  std::memcpy(out, &even, sizeof even);
  std::memcpy(out + ld, &odd, sizeof odd);
}

template <BlockFormat kFormat, typename T>
FP_INLINE void unpack_half(const uint8_t* group, int half, const ScaleAndMinimum& by, T* out,
                           int64_t ld) {
  const HalfGroup<kFormat> quants(group, half);
  const Floats scale0 = twice<false>(by.scale);
  const Floats scale1 = twice<true>(by.scale);
  const Floats minimum0 = twice<false>(by.minimum);
  const Floats minimum1 = twice<true>(by.minimum);
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    Floats first = quants.template quants<false>(j) * scale0;
    Floats second = quants.template quants<true>(j) * scale1;
    if constexpr (BlockScales<kFormat>::kSubtracts) {
      first -= minimum0;
      second -= minimum1;
    }
    store_pair(first, second, out + 2 * j * ld, ld);
  }
}

// Weights come from memory, mostly, and the processor itself does not look beyond a page: so far
// ahead of what is read they are asked for, in bytes. A third of a microsecond of a thread's share
// of memory. Strips follow each other, so the next one's begin is asked for too.
constexpr int kAhead = 6144;

template <BlockFormat kFormat>
FP_INLINE void ask_ahead(const uint8_t* group) {
  constexpr int kBytes = layout_of(kFormat).group_bytes() * kStripColumns;
  for (int line = 0; line < kBytes; line += 64)
    __builtin_prefetch(group + kAhead + line);
}

// See RowKernels::unpack.
template <BlockFormat kFormat, typename T>
void unpack_strip(const uint8_t* strip, int64_t begin, int64_t end, T* out, int64_t ld) {
  constexpr BlockLayout kLayout = layout_of(kFormat);
  constexpr int kGroups = kLayout.depth / kGroupDepth;
  for (int64_t at = begin / kGroupDepth; at < end / kGroupDepth;) {
    const uint8_t* block = strip + at / kGroups * (kLayout.bytes() * kStripColumns);
    const BlockScales<kFormat> scales(block);
    for (int g = static_cast<int>(at % kGroups); g < kGroups && at < end / kGroupDepth; ++g, ++at) {
      const uint8_t* group =
          block + (kLayout.scale_bytes + g * kLayout.group_bytes()) * kStripColumns;
      T* group_out = out + (at * kGroupDepth - begin) * ld;
      ask_ahead<kFormat>(group);
      ScaleAndMinimum by = scales.of(g, 0);
      unpack_half<kFormat>(group, 0, by, group_out, ld);
      if constexpr (kFormat == BlockFormat::kQ6K)
        by = scales.of(g, 1);
      unpack_half<kFormat>(group, 1, by, group_out + kGroupDepth / 2 * ld, ld);
    }
  }
}

#define FP_EACH_FORMAT(call)           \
  switch (format) {                    \
    case BlockFormat::kQ4_0:           \
      return call(BlockFormat::kQ4_0); \
    case BlockFormat::kQ4_1:           \
      return call(BlockFormat::kQ4_1); \
    case BlockFormat::kQ5_0:           \
      return call(BlockFormat::kQ5_0); \
    case BlockFormat::kQ5_1:           \
      return call(BlockFormat::kQ5_1); \
    case BlockFormat::kQ8_0:           \
      return call(BlockFormat::kQ8_0); \
    case BlockFormat::kQ4K:            \
      return call(BlockFormat::kQ4K);  \
    case BlockFormat::kQ5K:            \
      return call(BlockFormat::kQ5K);  \
    case BlockFormat::kQ6K:            \
      return call(BlockFormat::kQ6K);  \
  }

template <typename T>
void unpack(BlockFormat format, const uint8_t* strip, int64_t begin, int64_t end, T* out,
            int64_t ld) {
#define FP_UNPACK(f) unpack_strip<f>(strip, begin, end, out, ld)
  FP_EACH_FORMAT(FP_UNPACK)
#undef FP_UNPACK
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
