// attend_by_plain_tiles(): attention on AMX tiles, computed by plain loops. Called by
// attention_tile_test.cc.
#pragma once

#include "devices/cpu/row_kernels.h"

namespace flowprefill {

// Only where row_kernels<Bf16>().attend is not null.
void attend_by_plain_tiles(const AttentionTile& tile);

}  // namespace flowprefill
