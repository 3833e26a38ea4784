// Which element of a 16 x 8 x 16 matrix product lies in which lane and register (PTX ISA, "Matrix
// Fragments for mma.m16n8k16", bf16). Used by the attention body; tests/cpp/kernels checks that the
// maps cover every element exactly once and multiplies by them.
#pragma once

#include "devices/cuda/kernels/portable.h"

namespace flowprefill {

// c[16, 8], float: element i of a lane lies at (c_row, c_column).
FP_HD int32_t c_row(int32_t lane, int32_t i) {
  return lane / 4 + 8 * (i / 2);
}
FP_HD int32_t c_column(int32_t lane, int32_t i) {
  return 2 * (lane % 4) + i % 2;
}

// a[16, 16], bf16 pairs: register i of a lane holds (a_row, a_column) and the next column.
FP_HD int32_t a_row(int32_t lane, int32_t i) {
  return lane / 4 + 8 * (i % 2);
}
FP_HD int32_t a_column(int32_t lane, int32_t i) {
  return 2 * (lane % 4) + 8 * (i / 2);
}

// b[16, 8], bf16 pairs: register i of a lane holds (b_row, b_column) and the next row.
FP_HD int32_t b_row(int32_t lane, int32_t i) {
  return 2 * (lane % 4) + 8 * i;
}
FP_HD int32_t b_column(int32_t lane) {
  return lane / 4;
}

}  // namespace flowprefill
