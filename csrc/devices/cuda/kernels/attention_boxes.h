// AttentionBoxes: which boxes of the cache make up a tile of keys. Used by the loads of Hopper's
// attention (attention_hopper_loads.cuh), on the host when a launch is described and on the device.
#pragma once

#include <cstdint>

#include "devices/cuda/kernels/portable.h"

namespace flowprefill {

// The pattern in which rows are swizzled repeats after so many: boxes are not smaller.
constexpr int32_t kLeastBoxTokens = 8;

// A box is the largest power of two of tokens that fits into a block and into a tile a whole number
// of times: so none lies in two blocks, or in two tiles.
struct AttentionBoxes {
  int32_t block_shift = 0;  // a block holds 2^block_shift tokens
  int32_t shift = 0;        // a box 2^shift

  AttentionBoxes() = default;
  FP_HD AttentionBoxes(int32_t tile_keys, int32_t block_shift) : block_shift(block_shift) {
    while (shift < block_shift && tile_keys % (2 << shift) == 0)
      ++shift;
  }

  FP_HD int32_t tokens() const { return 1 << shift; }

  // The slot of a position within its block.
  FP_HD int32_t slot(int32_t position) const { return position & ((1 << block_shift) - 1); }

  // How far a position is from where its box begins.
  FP_HD int32_t within(int32_t position) const { return position & (tokens() - 1); }

  // The block of the box that begins at a position, of a sequence of so many keys; -1: it holds
  // none of them. The table is not read beyond them.
  FP_HD int32_t block(const int32_t* table, int32_t position, int32_t keys) const {
    return position < keys ? table[position >> block_shift] : -1;
  }
};

}  // namespace flowprefill
