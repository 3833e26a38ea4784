// attend_by_plain_tiles(), multiply_by_plain_tiles(): the kernels on AMX tiles, computed by plain
// loops. Called by attention_tile_test.cc and product_tile_test.cc.
#pragma once

#include "devices/cpu/row_kernels.h"

namespace flowprefill {

// Whether this processor executes what is between the tiles: AVX-512 BF16 and VBMI.
bool can_attend_by_plain_tiles();
void attend_by_plain_tiles(const AttentionTile& tile);

// Only where row_kernels<Bf16>().attend is not null.
void multiply_by_plain_tiles(const TileProduct& product);
void multiply_bytes_by_plain_tiles(const TileProduct& product);

}  // namespace flowprefill
