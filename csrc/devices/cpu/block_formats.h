// GGUF's quantised types as the CPU keeps them: the same bits, reordered at load so that 16 columns
// of a product stream together. Included by block_matrix and by the kernels that unpack
// (isa_blocks.h).
#pragma once

#include <cstdint>

namespace flowprefill {

// Every value of these is scale * quant - minimum.
enum class BlockFormat : uint8_t { kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kQ4K, kQ5K, kQ6K };
inline constexpr int kBlockFormats = 8;

// Columns that are interleaved: a strip.
inline constexpr int kStripColumns = 16;
// Depth of a group: of one scale (Q6_K: of two).
inline constexpr int kGroupDepth = 32;

// One block of one column, in bytes. In the strip a block of 16 columns is: all scales, field by
// field, a field's 16 columns together; then group by group the low bits, then the high ones.
//
// Low bits are four, but for Q8_0. A group has four vectors of 16 words: depths [0, 16) of columns
// [0, 8), of columns [8, 16), then depths [16, 32). Word 2c + p of a vector holds depths 2j + p of
// column c, j = 0..7, at bit 4j. High bits: word 2c + p holds those of column c in its lower half,
// of column 8 + c in its upper half; where there is one bit, depth 16h + 2j + p at bit 8h + j;
// where there are two, a vector for each h, at bit 2j. Q8_0: bytes [pair of depths][column][2].
struct BlockLayout {
  const char* name;  // GGUF's
  int depth;         // 32 or 256
  int scale_bytes;
  int low_bytes;   // of a group
  int high_bytes;  // of a group

  constexpr int group_bytes() const { return low_bytes + high_bytes; }
  constexpr int bytes() const { return scale_bytes + depth / kGroupDepth * group_bytes(); }
};

inline constexpr BlockLayout kBlockLayouts[kBlockFormats] = {
    {"Q4_0", 32, 2, 16, 0},   {"Q4_1", 32, 4, 16, 0},   {"Q5_0", 32, 2, 16, 4},
    {"Q5_1", 32, 4, 16, 4},   {"Q8_0", 32, 2, 32, 0},   {"Q4_K", 256, 16, 16, 0},
    {"Q5_K", 256, 16, 16, 4}, {"Q6_K", 256, 18, 16, 8},
};
constexpr const BlockLayout& layout_of(BlockFormat format) {
  return kBlockLayouts[static_cast<int>(format)];
}

}  // namespace flowprefill
