// Batch: the rows one run computes — new tokens of one or more sequences, packed one after another.
#pragma once

#include <cstdint>
#include <vector>

namespace flowprefill {

struct Sequence {
  int32_t row_begin = 0;  // first row in the batch
  int32_t rows = 0;       // new tokens
  int32_t context = 0;    // tokens already in the cache: position of the first row
  std::vector<int32_t> block_table;
};

struct Batch {
  std::vector<int32_t> tokens;  // [rows]
  std::vector<Sequence> sequences;

  int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
};

}  // namespace flowprefill
