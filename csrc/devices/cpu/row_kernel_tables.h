// The tables of row kernels that row_kernels.isa.cc makes, one for each instruction set. Read by
// row_kernels.cc, which chooses one, and by the tests, which try them all.
#pragma once

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

}  // namespace flowprefill
