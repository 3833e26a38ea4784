// What kernel bodies need on the device and on the host alike: markers, bfloat16, vectors of
// memory words, exponentials. Included by every *_body.h; needs no CUDA header.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FP_HD __host__ __device__ __forceinline__
#else
#define FP_HD inline
#endif

// True only where device instructions can be named.
#ifdef __CUDA_ARCH__
#define FP_ON_DEVICE 1
#else
#define FP_ON_DEVICE 0
#endif

#if FP_ON_DEVICE
#define FP_UNROLL _Pragma("unroll")
#define FP_ROLLED _Pragma("unroll 1")  // a body too large to stand there several times
#else
#define FP_UNROLL
#define FP_ROLLED
#endif

namespace flowprefill {

// bfloat16 as bits: the upper half of an IEEE float.
using Bf16 = uint16_t;

// What one thread moves at once.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vec {
  T v[kCount];
};

FP_HD uint32_t bits_of(float value) {
#if FP_ON_DEVICE
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FP_HD float float_of(uint32_t bits) {
#if FP_ON_DEVICE
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

FP_HD float widen(float value) {
  return value;
}
FP_HD float widen(Bf16 value) {
  return float_of(static_cast<uint32_t>(value) << 16);
}

// Two floats rounded to bf16 (to nearest, ties to even), `low` in the lower half.
FP_HD uint32_t pack_bf16(float low, float high) {
#if FP_ON_DEVICE
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  auto rounded = [](float value) {
    const uint32_t bits = bits_of(value);
    if (std::isnan(value))
      return uint32_t{0x7fff};  // what the device makes of any NaN
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  };
  return rounded(low) | rounded(high) << 16;
#endif
}

FP_HD Bf16 to_bf16(float value) {
  return static_cast<Bf16>(pack_bf16(value, 0.0f));
}

FP_HD void store(float value, float* out) {
  *out = value;
}
FP_HD void store(float value, Bf16* out) {
  *out = to_bf16(value);
}

// a * b + c, rounded once. Where the same sum stands in two kernels whose bits are to be equal:
// a compiler may fuse a plain one differently in each.
FP_HD float fused_multiply_add(float a, float b, float c) {
#if FP_ON_DEVICE
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// 2^x; -inf gives 0. The device's instruction is good to 2 units in the last place of a float.
FP_HD float exp2_of(float x) {
#if FP_ON_DEVICE
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// cap * tanh(x / cap) by way of 2^x; `inverse`: 1 / cap. Errs by some 1e-7 of cap.
FP_HD float soft_cap(float x, float cap, float inverse) {
  constexpr float kTwoLog2E = 2.88539008177792681472f;
  const float below = 1.0f + exp2_of(x * inverse * kTwoLog2E);
#if FP_ON_DEVICE
  return cap - __fdividef(2.0f * cap, below);  // 0 for a divisor beyond 2^126
#else
  return cap - 2.0f * cap / below;
#endif
}

FP_HD float minus_infinity() {
  return float_of(0xff800000u);
}

FP_HD int32_t smaller(int32_t a, int32_t b) {
  return a < b ? a : b;
}
FP_HD int32_t larger(int32_t a, int32_t b) {
  return a > b ? a : b;
}

}  // namespace flowprefill
