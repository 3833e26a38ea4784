// TileShapes: what AMX tiles are configured with, eight of up to 16 rows of 64 bytes. Loaded by the
// kernels on tiles (isa_tiles.h) and by the measured ceilings (ceilings.cc).
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

inline constexpr int kMostTileRows = 32;  // of two tiles, one below the other

// By the rows of a product: tiles 0, 1 and 4 have the upper sixteen, 2, 3 and 5 what is below.
struct TileShapesByRows {
  TileShapes of[kMostTileRows + 1];

  constexpr TileShapesByRows() : of{} {
    for (int rows = 0; rows <= kMostTileRows; ++rows) {
      const int upper = rows < 1 ? 1 : (rows < 16 ? rows : 16);
      const int lower = rows > 16 ? rows - 16 : 1;
      uint8_t* const tile = of[rows].rows;
      tile[0] = tile[1] = tile[4] = static_cast<uint8_t>(upper);
      tile[2] = tile[3] = tile[5] = static_cast<uint8_t>(lower);
    }
  }
};

// Not inline: each object has its own, so none takes a symbol from one for another instruction set.
constexpr TileShapesByRows kTileShapes;

}  // namespace flowprefill
