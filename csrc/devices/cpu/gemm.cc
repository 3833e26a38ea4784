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

bool has_amx() {
  return isa() == Isa::kAmx && has_bf16_gemm();
}

}  // namespace flowprefill
