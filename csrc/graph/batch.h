// Batch: the rows one run computes: new tokens of one or more sequences, packed one after another.
// Made by csrc/bindings, checked once, read by the planner and the devices.
#pragma once

#include <cstdint>
#include <vector>

namespace flowprefill {

struct Sequence {
  int32_t row_begin = 0;  // first row in the batch
  int32_t rows = 0;       // new tokens
  int32_t context = 0;    // tokens already in the cache: position of the first row
  std::vector<int32_t> block_table;
  int32_t next_token = -1;  // that follows its last row, if it is known: see PromptScore

  int32_t row_end() const { return row_begin + rows; }
  int32_t length() const { return context + rows; }
};

struct Batch {
  std::vector<int32_t> tokens;  // [rows]
  std::vector<Sequence> sequences;

  int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
  int32_t num_sequences() const { return static_cast<int32_t>(sequences.size()); }
};

// What a batch must keep to; 0: no limit.
struct BatchLimits {
  int32_t vocab_size = 0;
  int32_t block_tokens = 0;
  int32_t blocks = 0;  // of the KV cache
  int32_t max_tokens = 0;
  int32_t max_sequences = 0;
  int32_t max_context = 0;
};

// Throws std::invalid_argument naming what does not fit: no or too many tokens or sequences, a
// token outside the vocabulary, rows that are not packed, a block table too short or with a block
// that the cache has not.
void check(const Batch& batch, const BatchLimits& limits);

// KV blocks that a sequence of this many tokens needs.
int32_t blocks_of(int32_t tokens, int32_t block_tokens);

// Index of the sequence of each row, [rows].
std::vector<int32_t> sequence_of_rows(const Batch& batch);

// Last row of each sequence, [sequences].
std::vector<int32_t> last_rows(const Batch& batch);

}  // namespace flowprefill
