#include "devices/cuda/backend/batch_inputs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "devices/cuda/kernels/attention_args.h"

namespace flowprefill {
namespace {

[[noreturn]] void invalid(const std::string& what, int64_t got, const std::string& expected) {
  throw std::invalid_argument(what + ": got " + std::to_string(got) + ", expected " + expected);
}

int32_t blocks_of(const Sequence& s, int32_t block_tokens) {
  return static_cast<int32_t>((int64_t{s.context} + s.rows + block_tokens - 1) / block_tokens);
}

void check_sequence(const std::string& name, const Sequence& s, const BatchLimits& limits) {
  if (s.rows < 1)
    invalid(name + "tokens", s.rows, "at least 1");
  if (s.context < 0)
    invalid(name + "context", s.context, "at least 0");
  const int64_t length = int64_t{s.context} + s.rows;
  if (length > limits.max_context)
    invalid(name + "tokens", length, "at most max_context = " + std::to_string(limits.max_context));
  const int32_t needed = blocks_of(s, limits.block_tokens);
  if (static_cast<int64_t>(s.block_table.size()) < needed) {
    invalid(name + "KV blocks", static_cast<int64_t>(s.block_table.size()),
            "at least " + std::to_string(needed));
  }
  for (const int32_t block : s.block_table) {
    if (block < 0 || block >= limits.blocks)
      invalid(name + "KV block", block, "0.." + std::to_string(limits.blocks - 1));
  }
}

// Writes into the block; offsets come from the layout.
class Writer {
 public:
  explicit Writer(std::vector<std::byte>& bytes) : bytes_(bytes) {}

  template <typename T>
  void put(size_t offset, size_t index, const T& value) {
    std::memcpy(bytes_.data() + offset + index * sizeof(T), &value, sizeof(T));
  }
  template <typename T>
  void put_all(size_t offset, const std::vector<T>& values, size_t count) {
    if (count > 0)
      std::memcpy(bytes_.data() + offset, values.data(), count * sizeof(T));
  }

 private:
  std::vector<std::byte>& bytes_;
};

// What of the sequences lies in the rows.
std::vector<AttentionSlice> slices_in(const Batch& batch, const AttentionRows& rows) {
  std::vector<AttentionSlice> slices;
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const Sequence& s = batch.sequences[i];
    const int32_t begin = std::max(rows.begin, s.row_begin);
    const int32_t end = std::min(rows.end, s.row_begin + s.rows);
    if (begin >= end)
      continue;
    slices.push_back({.row = begin - rows.base,
                      .rows = end - begin,
                      .position = s.context + begin - s.row_begin,
                      .sequence = static_cast<int32_t>(i)});
  }
  return slices;
}

void put_tiles(Writer& out, const PlanShape& shape, const Batch& batch) {
  const int32_t heads_per_kv = shape.config.num_heads / shape.config.num_kv_heads;
  for (size_t i = 0; i < shape.attention.size(); ++i) {
    const std::vector<AttentionTile> tiles =
        attention_tiles(slices_in(batch, shape.attention[i]), heads_per_kv);
    out.put_all(shape.inputs.tiles[i], tiles, tiles.size());
  }
}

}  // namespace

void check_batch(const ModelConfig& config, const Batch& batch, const BatchLimits& limits) {
  if (batch.rows() < 1 || batch.rows() > limits.max_tokens) {
    invalid("batch: tokens", batch.rows(),
            "1.." + std::to_string(limits.max_tokens) + " (max_tokens)");
  }
  const auto sequences = static_cast<int64_t>(batch.sequences.size());
  if (sequences > limits.max_sequences) {
    invalid("batch: sequences", sequences,
            "at most max_sequences = " + std::to_string(limits.max_sequences));
  }
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
    if (token < 0 || token >= config.vocab_size)
      invalid("token id", token, "0.." + std::to_string(config.vocab_size - 1));
  }
}

void check_sampling(std::span<const SamplingParams> sampling, size_t num_sequences) {
  if (!sampling.empty() && sampling.size() != num_sequences) {
    invalid("sampling", static_cast<int64_t>(sampling.size()),
            std::to_string(num_sequences) + ", one per sequence, or none");
  }
  const auto require = [](bool holds, const char* field, double value, const char* allowed) {
    if (!holds) {
      throw std::invalid_argument(std::string(field) + ": got " + std::to_string(value) +
                                  ", expected " + allowed);
    }
  };
  for (const SamplingParams& p : sampling) {
    require(std::isfinite(p.temperature) && p.temperature >= 0, "temperature", p.temperature,
            "a number from 0");
    require(p.top_k >= 0, "top_k", p.top_k, "at least 0 (0: all)");
    require(p.top_p > 0 && p.top_p <= 1, "top_p", p.top_p, "a number above 0, at most 1");
    require(p.min_p >= 0 && p.min_p <= 1, "min_p", p.min_p, "a number from 0 to 1");
    require(p.uniform >= 0 && p.uniform < 1, "uniform", p.uniform, "a number from 0, below 1");
  }
}

int32_t longest_table(const Batch& batch, int32_t block_tokens) {
  int32_t longest = 0;
  for (const Sequence& s : batch.sequences)
    longest = std::max(longest, blocks_of(s, block_tokens));
  return longest;
}

std::vector<std::byte> batch_inputs(const PlanShape& shape, const Batch& batch,
                                    int32_t block_tokens,
                                    std::span<const SamplingParams> sampling) {
  const InputLayout& layout = shape.inputs;
  std::vector<std::byte> bytes(layout.bytes);
  Writer out(bytes);
  out.put_all(layout.tokens, batch.tokens, batch.tokens.size());
  for (size_t i = 0; i < static_cast<size_t>(shape.sizes.sequences); ++i)
    out.put(layout.last_rows, i, int32_t{-1});
  for (size_t i = 0; i < batch.sequences.size(); ++i) {
    const Sequence& s = batch.sequences[i];
    for (int32_t row = 0; row < s.rows; ++row) {
      const auto at = static_cast<size_t>(s.row_begin) + static_cast<size_t>(row);
      out.put(layout.sequences, at, static_cast<int32_t>(i) + 1);
      out.put(layout.positions, at, s.context + row);
    }
    out.put(layout.last_rows, i, s.row_begin + s.rows - 1);
    const size_t table = i * static_cast<size_t>(shape.sizes.table_stride) * sizeof(int32_t);
    out.put_all(layout.block_tables + table, s.block_table,
                static_cast<size_t>(blocks_of(s, block_tokens)));
  }
  for (size_t i = 0; i < sampling.size(); ++i)
    out.put(layout.sampling, i, sampling[i]);
  put_tiles(out, shape, batch);
  return bytes;
}

}  // namespace flowprefill
