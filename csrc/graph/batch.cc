#include "graph/batch.h"

#include <limits>
#include <stdexcept>
#include <string>

namespace flowprefill {
namespace {

[[noreturn]] void invalid(const std::string& what, int64_t got, const std::string& expected) {
  throw std::invalid_argument(what + ": got " + std::to_string(got) + ", expected " + expected);
}

void check_at_most(const std::string& what, int64_t got, int32_t limit, const char* setting) {
  if (got < 1)
    invalid(what, got, "at least 1");
  if (limit > 0 && got > limit)
    invalid(what, got, std::string("at most ") + setting + " = " + std::to_string(limit));
}

void check_blocks(const std::string& name, const Sequence& s, const BatchLimits& limits) {
  const int32_t needed = blocks_of(s.length(), limits.block_tokens);
  const auto got = static_cast<int64_t>(s.block_table.size());
  if (got < needed)
    invalid(name + "KV blocks", got, "at least " + std::to_string(needed));
  for (const int32_t block : s.block_table) {
    if (block < 0 || block >= limits.blocks)
      invalid(name + "KV block", block, "0.." + std::to_string(limits.blocks - 1));
  }
}

void check_sequence(const std::string& name, const Sequence& s, const BatchLimits& limits) {
  if (s.rows < 1)
    invalid(name + "tokens", s.rows, "at least 1");
  if (s.context < 0)
    invalid(name + "context", s.context, "at least 0");
  const int64_t length = int64_t{s.context} + s.rows;
  if (length > std::numeric_limits<int32_t>::max())
    invalid(name + "tokens", length, "fewer than 2^31");
  check_at_most(name + "tokens", length, limits.max_context, "max_context");
  if (s.next_token >= limits.vocab_size)
    invalid(name + "next_token", s.next_token,
            "a token below " + std::to_string(limits.vocab_size) + ", or -1");
  check_blocks(name, s, limits);
}

}  // namespace

int32_t blocks_of(int32_t tokens, int32_t block_tokens) {
  return static_cast<int32_t>((int64_t{tokens} + block_tokens - 1) / block_tokens);
}

void check(const Batch& batch, const BatchLimits& limits) {
  check_at_most("batch: tokens", batch.rows(), limits.max_tokens, "max_tokens");
  check_at_most("batch: sequences", batch.num_sequences(), limits.max_sequences, "max_sequences");
  int32_t row = 0;
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const Sequence& s = batch.sequences[i];
    const std::string name = "sequence " + std::to_string(i) + ": ";
    if (s.row_begin != row)
      invalid(name + "first row", s.row_begin, std::to_string(row) + ": rows are packed");
    check_sequence(name, s, limits);
    row += s.rows;
  }
  if (row != batch.rows())
    invalid("batch: rows of the sequences", row, std::to_string(batch.rows()) + ", as tokens");
  for (const int32_t token : batch.tokens) {
    if (token < 0 || token >= limits.vocab_size)
      invalid("token id", token, "0.." + std::to_string(limits.vocab_size - 1));
  }
}

std::vector<int32_t> sequence_of_rows(const Batch& batch) {
  std::vector<int32_t> sequences;
  sequences.reserve(batch.tokens.size());
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    sequences.insert(sequences.end(), static_cast<size_t>(batch.sequences[i].rows),
                     static_cast<int32_t>(i));
  }
  return sequences;
}

std::vector<int32_t> last_rows(const Batch& batch) {
  std::vector<int32_t> rows;
  rows.reserve(batch.sequences.size());
  for (const Sequence& s : batch.sequences)
    rows.push_back(s.row_end() - 1);
  return rows;
}

}  // namespace flowprefill
