// bf16 to float and back, for the tests of the CPU's kernels.
#pragma once

#include <bit>
#include <cstdint>

#include "devices/cpu/row_kernels.h"

namespace flowprefill {

inline float widened(Bf16 value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}
// Without rounding.
inline Bf16 narrowed(float value) {
  return static_cast<Bf16>(std::bit_cast<uint32_t>(value) >> 16);
}

}  // namespace flowprefill
