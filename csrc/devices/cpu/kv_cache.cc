#include "devices/cpu/kv_cache.h"

#include <cstring>
#include <type_traits>

namespace flowprefill {

void KvCache::zero(std::span<const int32_t> blocks) {
  check_blocks(blocks);
  for (const int32_t block : blocks) {
    const int64_t first = offset(0, block, 0) * element_bytes_;
    std::memset(memory_.as<char>() + first, 0, bytes_per_block(layout_, element_bytes_));
  }
}

template <>
void KvCache::clear_values_from<float>(int32_t layer, int32_t block, int32_t head, int32_t slot) {
  const auto tokens = static_cast<size_t>(layout_.block_tokens - slot);
  std::memset(value<float>(layer, block, head) + int64_t{slot} * layout_.head_dim, 0,
              tokens * static_cast<size_t>(layout_.head_dim) * sizeof(float));
}

template <>
void KvCache::clear_values_from<Bf16>(int32_t layer, int32_t block, int32_t head, int32_t slot) {
  Bf16* values = value<Bf16>(layer, block, head);
  if (slot % 2 != 0) {  // the second of a pair of tokens
    Bf16* pair = values + int64_t{slot / 2} * layout_.head_dim * 2;
    for (int32_t i = 0; i < layout_.head_dim; ++i)
      pair[2 * i + 1] = 0;
    ++slot;
  }
  const auto tokens = static_cast<size_t>(layout_.block_tokens - slot);
  std::memset(values + int64_t{slot} * layout_.head_dim, 0,
              tokens * static_cast<size_t>(layout_.head_dim) * sizeof(Bf16));
}

// Where the value of one token and dimension lies: see the layout above KvCache.
template <typename T, typename Visit>
void KvCache::visit(int32_t layer, int32_t block, const Visit& visit) {
  const int64_t dim = layout_.head_dim;
  const int64_t tokens = layout_.block_tokens;
  const int64_t pair = sizeof(T) == sizeof(Bf16) ? 2 : 1;
  const int64_t half = layout_.kv_heads * tokens * dim;
  for (int32_t h = 0; h < layout_.kv_heads; ++h) {
    T* keys = key<T>(layer, block, h);
    T* values = value<T>(layer, block, h);
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t d = 0; d < dim; ++d) {
        const int64_t at = (h * tokens + token) * dim + d;
        visit(keys[(d / pair * tokens + token) * pair + d % pair], at);
        visit(values[(token / pair * dim + d) * pair + token % pair], half + at);
      }
    }
  }
}

void KvCache::read(int32_t layer, int32_t block, std::span<float> values) {
  check_place(layer, block, values.size());
  const auto copy = [&values](const auto& element, int64_t at) {
    using T = std::remove_cvref_t<decltype(element)>;
    row_kernels<T>().widen(&element, 1, &values[static_cast<size_t>(at)]);
  };
  if (element_bytes_ == sizeof(float))
    visit<float>(layer, block, copy);
  else
    visit<Bf16>(layer, block, copy);
}

void KvCache::write(int32_t layer, int32_t block, std::span<const float> values) {
  check_place(layer, block, values.size());
  const auto copy = [&values](auto& element, int64_t at) {
    using T = std::remove_cvref_t<decltype(element)>;
    row_kernels<T>().narrow(&values[static_cast<size_t>(at)], 1, &element);
  };
  if (element_bytes_ == sizeof(float))
    visit<float>(layer, block, copy);
  else
    visit<Bf16>(layer, block, copy);
}

}  // namespace flowprefill
