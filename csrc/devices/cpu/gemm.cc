#include "devices/cpu/gemm.h"

#include <c10/util/Exception.h>

#include <array>

namespace flowprefill {

bool has_bf16_gemm() {
  static const bool has = [] {
    std::array<Bf16, 64> a{};
    std::array<Bf16, 64> b{};
    std::array<float, 4> c{};
    try {
      brgemm(Block<Bf16>{.n = 2, .k = 32, .lda = 32, .ldb = 2, .ldc = 2, .add = false}, 2, a.data(),
             b.data(), c.data());
      brgemm_end<Bf16>();
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  }();
  return has;
}

bool has_amx() {
#ifdef __x86_64__
  static const bool has = has_bf16_gemm() && __builtin_cpu_supports("amx-bf16");
  return has;
#else
  return false;
#endif
}

}  // namespace flowprefill
