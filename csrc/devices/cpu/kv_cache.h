// KvCache: storage of keys and values in paged blocks, kept in the layout the matrix kernel reads.
// Which block belongs to whom is accounted in Python (engine/kv_blocks.py); this is memory only.
#pragma once

#include <cstdint>
#include <span>

#include "devices/cpu/buffer.h"
#include "devices/cpu/row_kernels.h"

namespace flowprefill {

struct KvShape {
  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_tokens = 0;  // even
  int32_t blocks = 0;
};

// [layer][block][kv head]{K, V}. K: bf16 [dim / 2][token][2], float [dim][token];
// V: bf16 [token / 2][dim][2], float [token][dim]. Both are the right-hand operand of the attention
// products as they lie. Written and read on the device thread's team only.
class KvCache {
 public:
  KvCache(KvShape shape, int32_t element_bytes)
      : shape_(shape),
        element_bytes_(element_bytes),
        memory_(bytes_per_block(shape, element_bytes) * static_cast<size_t>(shape.blocks)) {}

  const KvShape& shape() const { return shape_; }
  size_t bytes() const { return memory_.bytes(); }
  static size_t bytes_per_block(const KvShape& s, int32_t element_bytes) {
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
    return key<T>(layer, block, head) + int64_t{shape_.head_dim} * shape_.block_tokens;
  }

  // Clears the values of tokens `slot` and later of a block: what its last owner left there may be
  // NaN, and a masked NaN still poisons a product.
  template <typename T>
  void clear_values_from(int32_t layer, int32_t block, int32_t head, int32_t slot);

  // Clears blocks whose content may hold NaN (after a failed run): a masked NaN still poisons a
  // product.
  void zero(std::span<const int32_t> blocks);

 private:
  int64_t offset(int32_t layer, int32_t block, int32_t head) const {
    const int64_t index = (int64_t{layer} * shape_.blocks + block) * shape_.kv_heads + head;
    return index * 2 * shape_.head_dim * shape_.block_tokens;
  }

  KvShape shape_;
  int32_t element_bytes_;
  Buffer memory_;
};

}  // namespace flowprefill
