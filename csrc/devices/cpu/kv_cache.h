// KvCache: storage of keys and values in paged blocks, kept in the layout the matrix kernel reads.
// Which block belongs to whom is accounted in Python (engine/kv_blocks.py); this is memory only.
#pragma once

#include <cstdint>
#include <span>

#include "devices/cpu/buffer.h"
#include "devices/cpu/row_kernels.h"
#include "graph/kv_store.h"

namespace flowprefill {

// [block][layer][kv head]{K, V}: the kernel commits memory in pages of 2 MB, so what a block needs
// in all layers lies together. K: bf16 [dim / 2][token][2], float [dim][token]; V: bf16 [token /
// 2][dim][2], float [token][dim]. Both are the right-hand operand of the attention products as they
// lie. Written and read on the device thread's team only.
class KvCache final : public KvStore {
 public:
  KvCache(const KvLayout& layout, int32_t element_bytes)
      : layout_(layout),
        element_bytes_(element_bytes),
        memory_(bytes_per_block(layout, element_bytes) * static_cast<size_t>(layout.blocks)) {}

  const KvLayout& layout() const override { return layout_; }
  size_t bytes() const { return memory_.bytes(); }
  static size_t bytes_per_block(const KvLayout& s, int32_t element_bytes) {
    return size_t{2} * static_cast<size_t>(s.layers) * static_cast<size_t>(s.kv_heads) *
           static_cast<size_t>(s.head_dim) * static_cast<size_t>(s.block_tokens) *
           static_cast<size_t>(element_bytes);
  }

  template <typename T>
  T* key(int32_t layer, int32_t block, int32_t head) {
    return memory_.as<T>() + offset(layer, block, head);
  }
  template <typename T>
  T* value(int32_t layer, int32_t block, int32_t head) {
    return key<T>(layer, block, head) + int64_t{layout_.head_dim} * layout_.block_tokens;
  }

  // Clears the values of tokens `slot` and later of a block: what its last owner left there may be
  // NaN, and a masked NaN still poisons a product.
  template <typename T>
  void clear_values_from(int32_t layer, int32_t block, int32_t head, int32_t slot);

  // Clears blocks whose content may hold NaN (after a failed run): a masked NaN still poisons a
  // product.
  void zero(std::span<const int32_t> blocks) override;

  void read(int32_t layer, int32_t block, std::span<float> values) override;
  void write(int32_t layer, int32_t block, std::span<const float> values) override;

 private:
  int64_t offset(int32_t layer, int32_t block, int32_t head) const {
    const int64_t index = (int64_t{block} * layout_.layers + layer) * layout_.kv_heads + head;
    return index * 2 * layout_.head_dim * layout_.block_tokens;
  }
  // Calls visit(element, value) for each value of a block of a layer in the order of KvStore.
  template <typename T, typename Visit>
  void visit(int32_t layer, int32_t block, const Visit& visit);

  KvLayout layout_;
  int32_t element_bytes_;
  Buffer memory_;
};

}  // namespace flowprefill
