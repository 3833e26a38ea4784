// BatchView, CacheView: device memory that describes a batch and the KV cache. Read by every kernel
// that knows of tokens or positions; a captured graph keeps the pointers, each run the contents.
#pragma once

#include "devices/cuda/kernels/portable.h"

namespace flowprefill {

// The rows of one batch. A graph is captured for a bucket of rows: rows beyond the batch are
// padding, marked by sequence 0; kernels compute nothing for them and write zeros where others
// read. So zeroed memory is a batch of padding: warming a graph on it touches no KV block.
struct BatchView {
  const int32_t* tokens = nullptr;        // [rows]
  const int32_t* sequences = nullptr;     // [rows] 1 + the row's sequence, 0: padding
  const int32_t* positions = nullptr;     // [rows] in the sequence
  const int32_t* block_tables = nullptr;  // [sequences, block_table_stride] KV blocks in order
  int64_t block_table_stride = 0;
};

// Keys and values of one layer. Elements between neighbours; a head's dimensions lie side by side.
struct CacheView {
  Bf16* keys = nullptr;
  Bf16* values = nullptr;
  int64_t block_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;
  int32_t block_shift = 0;  // a block holds 2^block_shift tokens

  // Offset of a token's first head, in keys and values alike. `table`: the sequence's blocks.
  FP_HD int64_t offset(const int32_t* table, int32_t position) const {
    const int32_t block = table[position >> block_shift];
    const int32_t slot = position & ((1 << block_shift) - 1);
    return block * block_stride + slot * token_stride;
  }
};

}  // namespace flowprefill
