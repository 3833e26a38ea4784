// E4m3: 8-bit floats of weights and of the rows that are multiplied with them: a sign, 4 bits of
// exponent, 3 of fraction, no infinities (torch's float8_e4m3fn). Included by the bodies of the FP8
// kernels and by DeviceWeights, which rounds weights as they arrive.
//
// Integer arithmetic on the device too, in place of the instructions that compute capability 8.9
// brings: one code for every architecture, and the tests on the host run it. But for codes to f16,
// which stands in the inner loop of a product.
#pragma once

#include "devices/cuda/kernels/portable.h"

namespace flowprefill {

struct E4m3 {
  uint8_t bits;
};

constexpr float kLargestE4m3 = 448.0f;

FP_HD float absolute(float value) {
  return float_of(bits_of(value) & 0x7fffffffu);
}

// To the nearest, ties to even; beyond 448 to 448, infinities too; NaN stays NaN (0x7f).
FP_HD E4m3 to_e4m3(float value) {
  constexpr uint32_t kLeastNormal = 0x3c800000u;  // 2^-6
  constexpr uint32_t kInfinity = 0x7f800000u;
  constexpr float kUnits = 16384.0f;  // whose last place is 2^-9, the step of subnormal numbers
  const uint32_t sign = bits_of(value) >> 24 & 0x80u;
  const uint32_t size = bits_of(value) & 0x7fffffffu;
  if (size > kInfinity)
    return {0x7f};
  uint32_t code;
  if (size < kLeastNormal) {
    code = bits_of(float_of(size) + kUnits) - bits_of(kUnits);
  } else {
    code = ((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3);
    code = code > 0x7eu ? 0x7eu : code;
  }
  return {static_cast<uint8_t>(sign | code)};
}

// Exact, in bf16 as well.
FP_HD float widen(E4m3 value) {
  const uint32_t sign = (value.bits & 0x80u) << 24;
  const uint32_t code = value.bits & 0x7fu;
  if (code == 0x7f)
    return float_of(0x7fc00000u);
  if (code < 8)  // subnormal
    return float_of(sign | bits_of(static_cast<float>(code) * 0.001953125f));
  return float_of(sign | ((code + (120u << 3)) << 20));
}

// f16 as bits: exact.
FP_HD uint32_t f16_of(E4m3 value) {
  constexpr uint32_t kLessExponent = (127 - 15) << 10;
  const uint32_t bits = bits_of(widen(value));
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u)
    return 0x7fff;
  return (bits >> 16 & 0x8000u) | (size == 0 ? 0 : (size >> 13) - kLessExponent);
}

// Four codes as pairs of f16, the lower two first.
FP_HD void widen_to_f16(uint32_t codes, uint32_t (&pairs)[2]) {
#if FP_ON_DEVICE && __CUDA_ARCH__ >= 890
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.rn.f16x2.e4m3x2 %0, low; "
      "cvt.rn.f16x2.e4m3x2 %1, high;}"
      : "=r"(pairs[0]), "=r"(pairs[1])
      : "r"(codes));
#else
  uint32_t f16[4];
  FP_UNROLL for (int i = 0; i < 4; ++i) f16[i] = f16_of({static_cast<uint8_t>(codes >> 8 * i)});
  pairs[0] = f16[0] | f16[1] << 16;
  pairs[1] = f16[2] | f16[3] << 16;
#endif
}

// What a row whose largest absolute value is `most` is divided by. Never 0, so that a row of zeros
// gives zeros; with an infinity it is infinite, and makes the infinity NaN and all else 0.
FP_HD float e4m3_scale(float most) {
  constexpr float kLeast = 7.88860905221011805e-31f;  // 2^-100: 1 / scale stays finite
  return (most > kLeast ? most : kLeast) / kLargestE4m3;
}

}  // namespace flowprefill
