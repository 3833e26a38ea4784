#include "ops/kv_cache.h"

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

}  // namespace flowprefill
