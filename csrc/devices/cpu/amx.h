// Attention's products on the processor's AMX tiles, whose sums stay there from block to block.
// Others are ATen's (gemm.h).
#pragma once

#include "devices/cpu/amx_product.h"
#include "devices/cpu/row_kernels.h"

namespace flowprefill {

// The sum of the terms, which take the place of a and b. Only where has_amx(), and for shapes that
// fits_amx() takes. The first call of a series shapes this thread's tiles: no other code may use
// them until release_amx().
void multiply_by_amx(const Product<Bf16>& product, AmxTerms terms);

// Ends the series, if there is one.
void release_amx();

}  // namespace flowprefill
