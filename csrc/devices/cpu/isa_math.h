// Arithmetic of the row kernels on one number and on a vector: rounding, 2^x, tanh. Included by the
// .isa.cc files only: each instruction set has its own copy, which no other file may see.
#pragma once

#ifdef __AVX512F__
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, in its own header (bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "devices/cpu/row_kernels.h"

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

constexpr float kLog2E = 1.44269504088896340736f;

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float value, float* out) {
  *out = value;
}
// Round to nearest even.
inline void store(float value, Bf16* out) {
  const uint32_t bits = bits_of(value);
  *out = static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float load(float value) {
  return value;
}
inline float load(Bf16 value) {
  return float_of(static_cast<uint32_t>(value) << 16);
}

// tanh(y) = y + y * z * p(z), z = y^2, below this; minimax in relative error: 1e-9 (own fit).
constexpr float kTanhBorder = 0.55f;
constexpr float kTanh[5] = {-0.3333331645f, 0.1333258599f, -0.05385230854f, 0.02107167803f,
                            -0.006274237763f};

// 2^f on [-0.5, 0.5], minimax in relative error: 7.5e-8 (own fit).
constexpr float kExp2[6] = {1.000000072f,    6.931469671e-1f, 2.402211972e-1f,
                            5.550713275e-2f, 9.675541331e-3f, 1.327647152e-3f};

// 2^x for x clamped to [-126, 126], NaN of NaN: 2^whole is multiplied, for added to the exponent's
// bits it would make a number of NaN. The truncation of a positive number rounds.
inline float exp2_clamped(float x) {
  x = x < -126.0f ? -126.0f : x;
  x = x > 126.0f ? 126.0f : x;
  const auto biased = static_cast<uint32_t>(static_cast<int32_t>(x + 127.5f));
  const float f = x - static_cast<float>(static_cast<int32_t>(biased - 127u));
  float p = kExp2[5];
  for (int i = 4; i >= 0; --i)
    p = p * f + kExp2[i];
  return p * float_of(biased << 23);
}

inline float tanh_of(float y) {
  const float z = y * y;
  float p = kTanh[4];
  for (int i = 3; i >= 0; --i)
    p = p * z + kTanh[i];
  const float big = 1.0f - 2.0f / (1.0f + exp2_clamped(y * (2.0f * kLog2E)));
  return __builtin_fabsf(y) < kTanhBorder ? y + y * z * p : big;
}

#ifdef __AVX512F__
// The same for 16 numbers, by instructions that no compiler makes of the plain loop; under- and
// overflow are right.
inline __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(kExp2[5]);
  for (int i = 4; i >= 0; --i)
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2[i]));
  return _mm512_scalef_ps(p, whole);
}
inline __m512 tanh_of(__m512 y) {
  const __m512 z = _mm512_mul_ps(y, y);
  __m512 p = _mm512_set1_ps(kTanh[4]);
  for (int i = 3; i >= 0; --i)
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(kTanh[i]));
  const __m512 small = _mm512_fmadd_ps(_mm512_mul_ps(y, z), p, y);
  const __m512 e = exp2_of(_mm512_mul_ps(y, _mm512_set1_ps(2.0f * kLog2E)));
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 big = _mm512_sub_ps(one, _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(one, e)));
  const __mmask16 is_small =
      _mm512_cmp_ps_mask(_mm512_abs_ps(y), _mm512_set1_ps(kTanhBorder), _CMP_LT_OQ);
  return _mm512_mask_blend_ps(is_small, big, small);
}
// Sums and maxima that do not wait for each other.
constexpr int kChains = 4;
inline __mmask16 lanes(int n) {
  return static_cast<__mmask16>(n >= 16 ? 0xffff : (1 << n) - 1);
}
inline void store(__m512 value, __mmask16 mask, float* out) {
  _mm512_mask_storeu_ps(out, mask, value);
}
// Narrowing in a register first: a narrowing store with a mask is slow on some processors.
inline void store(__m512 value, __mmask16 mask, Bf16* out) {
#ifdef __AVX512BF16__
  const auto narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
#else
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m256i narrow = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
  if (mask == 0xffff) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow);
  } else {
    _mm256_mask_storeu_epi16(out, mask, narrow);
  }
}
#endif

inline float inverse_sqrt(float x) {
  return 1.0f / __builtin_sqrtf(x);
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
