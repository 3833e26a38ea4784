#include "devices/cpu/block_matrix.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "devices/cpu/row_kernels.h"

namespace flowprefill {
namespace {

// Where a block of the file has its fields, in bytes; -1: it has no such field.
struct FileLayout {
  int scales;
  int low;
  int high;
};

constexpr FileLayout file_layout(BlockFormat format) {
  switch (format) {
    case BlockFormat::kQ4_0:
    case BlockFormat::kQ8_0:
      return {0, 2, -1};
    case BlockFormat::kQ4_1:
      return {0, 4, -1};
    case BlockFormat::kQ5_0:
      return {0, 6, 2};
    case BlockFormat::kQ5_1:
      return {0, 8, 4};
    case BlockFormat::kQ4K:
      return {0, 16, -1};
    case BlockFormat::kQ5K:
      return {0, 48, 16};
    case BlockFormat::kQ6K:
      return {192, 0, 128};
  }
  return {};
}

// The four low bits of depth i of group g.
template <BlockFormat kFormat>
uint32_t low_bits(const uint8_t* low, int g, int i) {
  if constexpr (kFormat == BlockFormat::kQ6K)
    return low[g / 4 * 64 + g % 2 * 32 + i] >> (g % 4 / 2 * 4) & 15;
  else if constexpr (layout_of(kFormat).depth == 256)
    return low[g / 2 * 32 + i] >> (g % 2 * 4) & 15;
  else
    return low[i % 16] >> (i / 16 * 4) & 15;
}

template <BlockFormat kFormat>
uint32_t high_bits(const uint8_t* high, int g, int i) {
  if constexpr (kFormat == BlockFormat::kQ6K)
    return high[g / 4 * 32 + i] >> (g % 4 * 2) & 3;
  else if constexpr (layout_of(kFormat).depth == 256)
    return high[i] >> g & 1;
  else
    return high[i / 8] >> (i % 8) & 1;
}

// Column c of a block's group in a strip: words and half words of its own.
template <BlockFormat kFormat>
void put_group(const uint8_t* block, int g, int c, uint8_t* group) {
  constexpr BlockLayout kLayout = layout_of(kFormat);
  constexpr FileLayout kFile = file_layout(kFormat);
  if constexpr (kFormat == BlockFormat::kQ8_0) {
    for (int pair = 0; pair < kGroupDepth / 2; ++pair)
      std::memcpy(group + pair * 32 + 2 * c, block + kFile.low + 2 * pair, 2);
    return;
  }
  uint8_t* above = group + kLayout.low_bytes * kStripColumns;
  for (int half = 0; half < 2; ++half) {
    for (int parity = 0; parity < 2; ++parity) {
      const int lane = c % 8 * 2 + parity;
      uint32_t low = 0;
      uint32_t high = 0;
      for (int j = 0; j < 8; ++j) {
        const int i = 16 * half + 2 * j + parity;
        low |= low_bits<kFormat>(block + kFile.low, g, i) << (4 * j);
        if constexpr (kFile.high >= 0)
          high |= high_bits<kFormat>(block + kFile.high, g, i) << (kLayout.high_bytes / 4 * j);
      }
      std::memcpy(group + (2 * half + c / 8) * 64 + 4 * lane, &low, 4);
      if constexpr (kLayout.high_bytes == 4)
        above[4 * lane + c / 8 * 2 + half] = static_cast<uint8_t>(high);
      else if constexpr (kLayout.high_bytes == 8)
        std::memcpy(above + 64 * half + 4 * lane + c / 8 * 2, &high, 2);
    }
  }
}

template <BlockFormat kFormat>
void put_scales(const uint8_t* block, int c, uint8_t* out) {
  constexpr BlockLayout kLayout = layout_of(kFormat);
  const uint8_t* scales = block + file_layout(kFormat).scales;
  const auto put_half = [&](const uint8_t* from, int field) {
    std::memcpy(out + field * 2 * kStripColumns + 2 * c, from, 2);
  };
  if constexpr (kFormat == BlockFormat::kQ6K) {
    put_half(scales + 16, 0);
    for (int i = 0; i < 16; ++i)
      out[(2 + i) * kStripColumns + c] = scales[i];
    return;
  }
  put_half(scales, 0);
  if constexpr (kLayout.scale_bytes > 2)
    put_half(scales + 2, 1);
  for (int i = 4; i < kLayout.scale_bytes; ++i)
    out[i * kStripColumns + c] = scales[i];
}

template <BlockFormat kFormat>
void put_column(const uint8_t* row, int64_t depth, int c, uint8_t* strip) {
  constexpr BlockLayout kLayout = layout_of(kFormat);
  for (int64_t k = 0; k < depth; k += kLayout.depth, row += kLayout.bytes()) {
    put_scales<kFormat>(row, c, strip);
    uint8_t* groups = strip + kLayout.scale_bytes * kStripColumns;
    for (int g = 0; g < kLayout.depth / kGroupDepth; ++g)
      put_group<kFormat>(row, g, c, groups + g * kLayout.group_bytes() * kStripColumns);
    strip += kLayout.bytes() * kStripColumns;
  }
}

void put_column(BlockFormat format, const uint8_t* row, int64_t depth, int c, uint8_t* strip) {
  switch (format) {
    case BlockFormat::kQ4_0:
      return put_column<BlockFormat::kQ4_0>(row, depth, c, strip);
    case BlockFormat::kQ4_1:
      return put_column<BlockFormat::kQ4_1>(row, depth, c, strip);
    case BlockFormat::kQ5_0:
      return put_column<BlockFormat::kQ5_0>(row, depth, c, strip);
    case BlockFormat::kQ5_1:
      return put_column<BlockFormat::kQ5_1>(row, depth, c, strip);
    case BlockFormat::kQ8_0:
      return put_column<BlockFormat::kQ8_0>(row, depth, c, strip);
    case BlockFormat::kQ4K:
      return put_column<BlockFormat::kQ4K>(row, depth, c, strip);
    case BlockFormat::kQ5K:
      return put_column<BlockFormat::kQ5K>(row, depth, c, strip);
    case BlockFormat::kQ6K:
      return put_column<BlockFormat::kQ6K>(row, depth, c, strip);
  }
}

// One column of a strip; see RowKernels::unpack for the layouts.
template <typename T>
void column_of(BlockFormat format, const uint8_t* strip, int64_t depth, int64_t c, T* out) {
  constexpr int64_t kStep = 256;
  T tile[kStep * kStripColumns];
  for (int64_t begin = 0; begin < depth; begin += kStep) {
    const int64_t end = std::min(begin + kStep, depth);
    row_kernels<T>().unpack(format, strip, begin, end, tile, kStripColumns);
    for (int64_t k = 0; k < end - begin; ++k) {
      *out++ = sizeof(T) == sizeof(Bf16) ? tile[(k / 2 * kStripColumns + c) * 2 + k % 2]
                                         : tile[k * kStripColumns + c];
    }
  }
}

}  // namespace

int64_t block_row_bytes(BlockFormat format, int64_t depth) {
  const BlockLayout& layout = layout_of(format);
  if (depth % layout.depth != 0) {
    throw std::invalid_argument(std::string(layout.name) + ": got rows of " +
                                std::to_string(depth) + ", expected a multiple of " +
                                std::to_string(layout.depth));
  }
  return depth / layout.depth * layout.bytes();
}

BlockFormat block_format_of(const std::string& name) {
  std::string known;
  for (int i = 0; i < kBlockFormats; ++i) {
    if (name == kBlockLayouts[i].name)
      return static_cast<BlockFormat>(i);
    known += (i == 0 ? "" : ", ") + std::string(kBlockLayouts[i].name);
  }
  throw std::invalid_argument("quantised type: got " + name + ", expected one of " + known);
}

BlockMatrix::BlockMatrix(int64_t depth, std::vector<BlockFormat> formats)
    : depth_(depth), formats_(std::move(formats)) {
  size_t total = 0;
  for (const BlockFormat format : formats_) {
    offsets_.push_back(total);
    total += static_cast<size_t>(block_row_bytes(format, depth)) * kStripColumns;
  }
  storage_ = Buffer(total);
}

void BlockMatrix::pack(const BlockRows& from, int64_t rows, Team& team,
                       const std::function<int64_t(int64_t)>& place) {
  const int64_t row_bytes = block_row_bytes(from.format, depth_);
  team.for_each(rows, [&](int64_t row) {
    const int64_t column = place(row);
    const auto strip = static_cast<size_t>(column / kStripColumns);
    put_column(from.format, from.bytes + row * row_bytes, depth_,
               static_cast<int>(column % kStripColumns), storage_.as<uint8_t>() + offsets_[strip]);
  });
}

template <typename T>
void BlockMatrix::column(int64_t index, T* out) const {
  const int64_t at = index / kStripColumns;
  column_of(format(at), strip(at), depth_, index % kStripColumns, out);
}

template void BlockMatrix::column(int64_t, float*) const;
template void BlockMatrix::column(int64_t, Bf16*) const;

void unpack_rows(const BlockRows& from, int64_t rows, int64_t depth, Team& team, float* out) {
  const int64_t row_bytes = block_row_bytes(from.format, depth);
  team.for_each(rows, [&](int64_t row) {
    thread_local std::vector<uint8_t> strip;
    strip.resize(static_cast<size_t>(row_bytes * kStripColumns));
    put_column(from.format, from.bytes + row * row_bytes, depth, 0, strip.data());
    column_of(from.format, strip.data(), depth, 0, out + row * depth);
  });
}

}  // namespace flowprefill
