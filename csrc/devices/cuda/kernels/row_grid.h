// Grids of the kernels that handle a row's columns apart: threads of a block, blocks of a row. Used
// by row_kernels.cu and fp8_kernels.cu, and by the double of the kernels.
#pragma once

#include <vector_types.h>

#include <cstdint>

#include "devices/cuda/kernels/row_bodies.h"

namespace flowprefill {

inline constexpr int kColumnThreads = 128;

// Blocks that a row of `width` elements takes, of which a thread handles `per_thread`.
inline int32_t column_parts(int32_t width, int32_t per_thread = kColumnsPerThread) {
  const int32_t columns = kColumnThreads * per_thread;
  return (width + columns - 1) / columns;
}

// Rows lie in x, which has no limit that matters; parts of a row in y.
inline dim3 row_grid(int32_t rows, int32_t parts = 1) {
  return dim3(static_cast<unsigned>(rows), static_cast<unsigned>(parts), 1);
}

}  // namespace flowprefill
