#include "graph/kv_store.h"

#include <stdexcept>
#include <string>

namespace flowprefill {
namespace {

void require(bool holds, const char* field, int64_t value, const std::string& allowed) {
  if (!holds) {
    throw std::invalid_argument(std::string(field) + ": got " + std::to_string(value) +
                                ", expected " + allowed);
  }
}

std::string below(int32_t count) {
  return "0.." + std::to_string(count - 1);
}

}  // namespace

void check(const KvLayout& layout) {
  require(layout.block_tokens >= 2 && layout.block_tokens % 2 == 0, "block_tokens",
          layout.block_tokens, "an even number");
  require(layout.blocks >= 1, "blocks", layout.blocks, "at least 1");
}

void KvStore::check_blocks(std::span<const int32_t> blocks) const {
  for (const int32_t block : blocks)
    require(block >= 0 && block < layout().blocks, "blocks", block, below(layout().blocks));
}

void KvStore::check_place(int32_t layer, int32_t block, size_t num_values) const {
  const KvLayout& l = layout();
  require(layer >= 0 && layer < l.layers, "layer", layer, below(l.layers));
  require(block >= 0 && block < l.blocks, "block", block, below(l.blocks));
  require(num_values == l.values_per_block(), "values", static_cast<int64_t>(num_values),
          std::to_string(l.values_per_block()));
}

}  // namespace flowprefill
