// Products on the processor's AMX tiles, without a compiler at run time: ATen's micro-kernel is
// compiled for every shape, on every thread.
#pragma once

#include "devices/cpu/amx_product.h"
#include "devices/cpu/row_kernels.h"

namespace flowprefill {

// Only where has_amx(), and for shapes that fits_amx() takes. The first call of a series shapes
// this thread's tiles: no other code may use them until release_amx().
// The sum of the terms, which take the place of a and b.
void multiply_by_amx(const Product<Bf16>& product, AmxTerms terms);

// Whether this thread is in such a series.
bool holds_amx();
// Ends it, if there is one.
void release_amx();

}  // namespace flowprefill
