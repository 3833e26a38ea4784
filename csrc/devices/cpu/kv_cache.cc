#include "devices/cpu/kv_cache.h"

#include <cstring>

namespace flowprefill {

void KvCache::zero(std::span<const int32_t> blocks) {
  const size_t stride =
      bytes_per_block(shape_, element_bytes_) / static_cast<size_t>(shape_.layers);
  for (int32_t layer = 0; layer < shape_.layers; ++layer) {
    for (const int32_t block : blocks) {
      const int64_t first = offset(layer, block, 0) * element_bytes_;
      std::memset(memory_.as<char>() + first, 0, stride);
    }
  }
}

template <>
void KvCache::clear_values_from<float>(int32_t layer, int32_t block, int32_t head, int32_t slot) {
  const auto tokens = static_cast<size_t>(shape_.block_tokens - slot);
  std::memset(value<float>(layer, block, head) + int64_t{slot} * shape_.head_dim, 0,
              tokens * static_cast<size_t>(shape_.head_dim) * sizeof(float));
}

template <>
void KvCache::clear_values_from<Bf16>(int32_t layer, int32_t block, int32_t head, int32_t slot) {
  Bf16* values = value<Bf16>(layer, block, head);
  if (slot % 2 != 0) {  // the second of a pair of tokens
    Bf16* pair = values + int64_t{slot / 2} * shape_.head_dim * 2;
    for (int32_t i = 0; i < shape_.head_dim; ++i)
      pair[2 * i + 1] = 0;
    ++slot;
  }
  const auto tokens = static_cast<size_t>(shape_.block_tokens - slot);
  std::memset(values + int64_t{slot} * shape_.head_dim, 0,
              tokens * static_cast<size_t>(shape_.head_dim) * sizeof(Bf16));
}

}  // namespace flowprefill
