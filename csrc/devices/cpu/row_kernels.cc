// Chooses the row kernels for this processor, once.
#include "devices/cpu/row_kernels.h"

namespace flowprefill {

#define FP_DECLARE_ISA(isa)                      \
  namespace isa {                                \
  extern const RowKernels<float> kRowKernelsF32; \
  extern const RowKernels<Bf16> kRowKernelsBf16; \
  }
FP_DECLARE_ISA(isa_baseline)
#if FP_ISA_LEVELS > 1
FP_DECLARE_ISA(isa_avx2)
FP_DECLARE_ISA(isa_avx512)
FP_DECLARE_ISA(isa_avx512bf16)
#endif
#undef FP_DECLARE_ISA

namespace {

struct Choice {
  const char* isa;
  const RowKernels<float>* f32;
  const RowKernels<Bf16>* bf16;
};

Choice choose() {
#if FP_ISA_LEVELS > 1
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd")) {
    if (__builtin_cpu_supports("avx512bf16")) {
      return {"avx512bf16", &isa_avx512bf16::kRowKernelsF32, &isa_avx512bf16::kRowKernelsBf16};
    }
    return {"avx512", &isa_avx512::kRowKernelsF32, &isa_avx512::kRowKernelsBf16};
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi2")) {
    return {"avx2", &isa_avx2::kRowKernelsF32, &isa_avx2::kRowKernelsBf16};
  }
#endif
  return {"baseline", &isa_baseline::kRowKernelsF32, &isa_baseline::kRowKernelsBf16};
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

template <>
const RowKernels<float>& row_kernels<float>() {
  return *choice().f32;
}

template <>
const RowKernels<Bf16>& row_kernels<Bf16>() {
  return *choice().bf16;
}

const char* row_kernel_isa() {
  return choice().isa;
}

}  // namespace flowprefill
