// TileShapes: what AMX tiles are configured with, eight of 16 rows of 64 bytes. Loaded by the
// kernel of attention (isa_attention_amx.h) and by the measured ceilings (ceilings.cc).
#pragma once

#include <cstdint>

namespace flowprefill {

// As the processor reads them (palette 1).
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

// Not inline: each object has its own, so none takes a symbol from one for another instruction set.
constexpr TileShapes kTileShapes;

}  // namespace flowprefill
