// What few_rows_body() makes of a pair of its sums: scales, bias, sum or gate, stored. Where a rope
// follows, fused_product_body.h does it.
#pragma once

#include "devices/cuda/kernels/gemm_args.h"
#include "devices/cuda/kernels/gemm_gate.h"

namespace flowprefill {

// What an epilogue adds to a pair of sums or multiplies them by.
struct FewRowsFactors {
  float d[2] = {};
  float scales[2] = {1, 1};
};

template <typename Output>
FP_HD Vec<Output, 2>* few_rows_d(const GemmArgs& args, int32_t row, int32_t column) {
  return reinterpret_cast<Vec<Output, 2>*>(args.first_d<Output>() + row * args.ldd + column);
}

// row: from the slice's first.
template <typename Element>
FP_HD FewRowsFactors load_factors(const GemmArgs& args, int32_t row, int32_t column) {
  FewRowsFactors out;
  if (args.adds_to_d) {
    FP_UNROLL for (int i = 0; i < 2; ++i) {
      out.d[i] = args.output == GemmOutput::kFloat
                     ? few_rows_d<float>(args, row, column)->v[i]
                     : widen(few_rows_d<Bf16>(args, row, column)->v[i]);
    }
  }
  if (sizeof(Element) == 1 && args.fp8.a_scales != nullptr) {
    const float row_scale = args.fp8.a_scales[args.row_begin + row];
    FP_UNROLL for (int i = 0; i < 2; ++i) out.scales[i] = row_scale * args.fp8.b_scales[column + i];
  }
  return out;
}

// scale * sums (+ bias) (+ d), of two columns, to d.
template <typename Output>
FP_HD void store_few(const GemmArgs& args, int32_t row, int32_t column, const float (&sums)[2],
                     const float (&before)[2]) {
  Vec<Output, 2> d;
  FP_UNROLL for (int i = 0; i < 2; ++i) {
    float value = sums[i] * args.scale;
    if (args.bias != nullptr)
      value += args.bias[column + i];
    if (args.adds_to_d)
      value += before[i];
    store(value, &d.v[i]);
  }
  *few_rows_d<Output>(args, row, column) = d;
}

FP_HD void finish_few(const GemmArgs& args, int32_t row, int32_t column, float (&sums)[2],
                      const FewRowsFactors& factors) {
  FP_UNROLL for (int i = 0; i < 2; ++i) sums[i] *= factors.scales[i];
  if (args.is_gated) {
    const GatedOutput out{args.first_d<Bf16>(), args.ldd,     args.bias,
                          args.rows(),          args.columns, args.is_gelu};
    store_gated(out, row, column, sums);
  } else if (args.output == GemmOutput::kFloat) {
    store_few<float>(args, row, column, sums, factors.d);
  } else {
    store_few<Bf16>(args, row, column, sums, factors.d);
  }
}

}  // namespace flowprefill
