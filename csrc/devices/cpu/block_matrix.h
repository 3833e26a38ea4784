// BlockMatrix: a weight matrix kept in GGUF's quantised blocks, reordered at load into strips of 16
// columns. BlockLinear multiplies by it; the embedding table looks rows up in it.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "devices/cpu/block_formats.h"
#include "devices/cpu/buffer.h"
#include "devices/cpu/team.h"

namespace flowprefill {

// Tensors of the checkpoint that come in quantised blocks.
using BlockFormats = std::map<std::string, BlockFormat>;

// Rows of a checkpoint's tensor as its file has them: [rows, bytes of a row].
struct BlockRows {
  BlockFormat format = BlockFormat::kQ8_0;
  const uint8_t* bytes = nullptr;
};

// Bytes of a row in the file. Throws std::invalid_argument unless depth is a multiple of the
// format's block.
int64_t block_row_bytes(BlockFormat format, int64_t depth);

// The format of GGUF's name. Throws std::invalid_argument naming it where the CPU keeps no such.
BlockFormat block_format_of(const std::string& name);

// Unpacks rows as the file has them: out [rows, depth]. At load; shares them out to the team.
void unpack_rows(const BlockRows& from, int64_t rows, int64_t depth, Team& team, float* out);

class BlockMatrix {
 public:
  BlockMatrix() = default;
  // formats: of each strip of 16 columns.
  BlockMatrix(int64_t depth, std::vector<BlockFormat> formats);

  int64_t depth() const { return depth_; }
  size_t bytes() const { return storage_.bytes(); }
  BlockFormat format(int64_t strip) const { return formats_[static_cast<size_t>(strip)]; }
  const uint8_t* strip(int64_t index) const {
    return storage_.as<uint8_t>() + offsets_[static_cast<size_t>(index)];
  }

  // Puts rows [0, rows) as columns place(row), whose strips have the rows' format. At load only;
  // shares the rows out to the team.
  void pack(const BlockRows& from, int64_t rows, Team& team,
            const std::function<int64_t(int64_t)>& place);

  // out [depth]: one column, rounded to T. Cost: unpacks its strip.
  template <typename T>
  void column(int64_t index, T* out) const;

 private:
  int64_t depth_ = 0;
  std::vector<BlockFormat> formats_;
  std::vector<size_t> offsets_;
  Buffer storage_;
};

}  // namespace flowprefill
