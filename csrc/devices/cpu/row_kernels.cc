// Chooses the row kernels for the instruction set in use, once.
#include "devices/cpu/row_kernels.h"

#include "devices/cpu/isa.h"
#include "devices/cpu/row_kernel_tables.h"

namespace flowprefill {
namespace {

struct Choice {
  const RowKernels<float>* f32;
  const RowKernels<Bf16>* bf16;
};

Choice choose() {
#if FP_ISA_LEVELS > 1
  switch (isa()) {
    case Isa::kAmx:
    case Isa::kAvx512Bf16:
      return {&isa_avx512bf16::kRowKernelsF32, &isa_avx512bf16::kRowKernelsBf16};
    case Isa::kAvx512:
      return {&isa_avx512::kRowKernelsF32, &isa_avx512::kRowKernelsBf16};
    case Isa::kAvx2:
      return {&isa_avx2::kRowKernelsF32, &isa_avx2::kRowKernelsBf16};
    case Isa::kBaseline:
      break;
  }
#endif
  return {&isa_baseline::kRowKernelsF32, &isa_baseline::kRowKernelsBf16};
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

}  // namespace flowprefill
