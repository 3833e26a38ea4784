// Rows of products in 8 bits: rotation, rounding to 8 bits, scaling back. Included by the .isa.cc
// files only: each instruction set has its own copy.
//
// Single large values would leave few of the 8 bits to all others of a row. So each run of 64
// values is multiplied by the Hadamard matrix of that size over 8: orthogonal, so a product of two
// rows that are both rotated is the same, and it spreads a large value over its whole run.
#pragma once

#include <cstdint>

#include "devices/cpu/isa_math.h"

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

constexpr float kRotationScale = 0.125f;  // 1 / sqrt(kRotatedRun)

#ifdef __AVX512F__
inline __m512 load16(const float* in, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, in);
}
inline __m512 load16(const Bf16* in, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, in));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// Sums in lanes where the sign is plus, differences elsewhere.
inline __m512 butterfly(__m512 x, __m512 partner, __mmask16 minus) {
  return _mm512_mask_sub_ps(_mm512_add_ps(x, partner), minus, partner, x);
}

inline void rotate_run(__m512 (&v)[4]) {
  for (__m512& x : v) {
    x = butterfly(x, _mm512_permute_ps(x, 0b10110001), 0xaaaa);
    x = butterfly(x, _mm512_permute_ps(x, 0b01001110), 0xcccc);
    x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0b10110001), 0xf0f0);
    x = butterfly(x, _mm512_shuffle_f32x4(x, x, 0b01001110), 0xff00);
  }
  const __m512 a = _mm512_add_ps(v[0], v[1]);
  const __m512 b = _mm512_sub_ps(v[0], v[1]);
  const __m512 c = _mm512_add_ps(v[2], v[3]);
  const __m512 d = _mm512_sub_ps(v[2], v[3]);
  v[0] = _mm512_add_ps(a, c);
  v[1] = _mm512_add_ps(b, d);
  v[2] = _mm512_sub_ps(a, c);
  v[3] = _mm512_sub_ps(b, d);
}

template <typename T>
float rotate(const T* in, int n, float* out) {
  __m512 most = _mm512_setzero_ps();
  __mmask16 is_nan = 0;
  for (int i = 0; i < n; i += kRotatedRun) {
    __m512 v[4];
    for (int j = 0; j < 4; ++j) {
      const int left = n - i - 16 * j;
      v[j] = left > 0 ? load16(in + i + 16 * j, lanes(left)) : _mm512_setzero_ps();
    }
    rotate_run(v);
    for (int j = 0; j < 4; ++j) {
      v[j] = _mm512_mul_ps(v[j], _mm512_set1_ps(kRotationScale));
      is_nan |= _mm512_cmp_ps_mask(v[j], v[j], _CMP_UNORD_Q);
      most = _mm512_max_ps(most, _mm512_abs_ps(v[j]));
      _mm512_storeu_ps(out + i + 16 * j, v[j]);
    }
  }
  return is_nan != 0 ? __builtin_nanf("") : _mm512_reduce_max_ps(most);
}
#else
inline void rotate_run(float* v) {
  for (int half = 1; half < kRotatedRun; half *= 2) {
    for (int i = 0; i < kRotatedRun; i += 2 * half) {
      for (int j = i; j < i + half; ++j) {
        const float a = v[j];
        const float b = v[j + half];
        v[j] = a + b;
        v[j + half] = a - b;
      }
    }
  }
}

template <typename T>
float rotate(const T* in, int n, float* out) {
  float most = 0.0f;
  bool is_nan = false;
  for (int i = 0; i < n; i += kRotatedRun) {
    for (int j = 0; j < kRotatedRun; ++j)
      out[i + j] = i + j < n ? load(in[i + j]) : 0.0f;
    rotate_run(out + i);
    for (int j = i; j < i + kRotatedRun; ++j) {
      out[j] *= kRotationScale;
      const float size = __builtin_fabsf(out[j]);
      is_nan |= size != size;
      most = size > most ? size : most;
    }
  }
  return is_nan ? __builtin_nanf("") : most;
}
#endif

void round_to_bytes(const float* in, int n, float scale, uint8_t* out) {
  int i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= n; i += 16) {
    const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(in + i), _mm512_set1_ps(scale));
    const __m512i byte = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(kByteZero));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(byte));
  }
#endif
  for (; i < n; ++i)
    out[i] = static_cast<uint8_t>(static_cast<int>(__builtin_rintf(in[i] * scale)) + kByteZero);
}

void scale_product(const ByteProduct& p, int rows, float* __restrict c, int64_t ldc, bool add) {
  for (int r = 0; r < rows; ++r) {
    const int32_t* __restrict product = p.product + static_cast<int64_t>(r) * p.columns;
    const float* __restrict scales = p.column_scales;
    const float row_scale = *reinterpret_cast<const float*>(p.row_scales + r * p.row_stride);
    float* __restrict out = c + r * ldc;
    for (int i = 0; i < p.columns; ++i) {
      const float value =
          static_cast<float>(product[i] - p.column_shifts[i]) * (row_scale * scales[i]);
      out[i] = add ? out[i] + value : value;
    }
  }
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
