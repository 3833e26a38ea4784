#include "devices/cpu/gemm.h"

#include <array>
#include <exception>

#include "devices/cpu/isa.h"

namespace flowprefill {

bool has_bf16_gemm() {
  static const bool has = [] {
    if (isa() < Isa::kAvx512Bf16)
      return false;
    std::array<Bf16, 64> a{};
    std::array<Bf16, 64> b{};
    std::array<float, 4> c{};
    try {
      brgemm(Block<Bf16>{.n = 2, .k = 32, .lda = 32, .ldb = 2, .ldc = 2, .add = false}, 2, a.data(),
             b.data(), c.data());
      brgemm_end<Bf16>();
      return true;
    } catch (const std::exception&) {  // c10::Error from ATen, dnnl::error from oneDNN
      return false;
    }
  }();
  return has;
}

bool has_int8_gemm() {
  static const bool has = [] {
    if (isa() < Isa::kAvx512)
      return false;
    constexpr int kDepth = 64;
    std::array<uint8_t, kDepth> a{};
    std::array<int8_t, kDepth * 16> b{};
    std::array<int32_t, 16> c{};
    a.fill(255);  // sums of pairs that fit no 16 bits
    b.fill(127);
    try {
      brgemm(
          Block<uint8_t>{.n = 16, .k = kDepth, .lda = kDepth, .ldb = 16, .ldc = 16, .add = false},
          1, a.data(), b.data(), c.data());
      brgemm_end<uint8_t>();
      return c[0] == kDepth * 255 * 127 && c[15] == c[0];
    } catch (const std::exception&) {
      return false;
    }
  }();
  return has;
}

bool has_amx() {
  return isa() == Isa::kAmx;
}

}  // namespace flowprefill
