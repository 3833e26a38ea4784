// DeviceKvCache: keys and values of all layers on the GPU, in blocks of a power of two of tokens.
// Owned by CudaBackend; which block belongs to whom is accounted in Python (engine/kv_blocks.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "devices/cuda/kernels/batch_view.h"
#include "devices/cuda/runtime/memory.h"
#include "devices/cuda/runtime/stream.h"
#include "graph/kv_store.h"

namespace flowprefill {

// [layer][block]{K, V}[kv head][token][head_dim] bf16: a head's tokens lie side by side, as the
// attention kernel reads them, and a block's keys and values of a layer are one piece, in the order
// of KvStore.
class DeviceKvCache final : public KvStore {
 public:
  // Throws std::invalid_argument unless block_tokens is a power of two, 2 to 4096, and blocks >= 1;
  // CudaError.
  DeviceKvCache(const KvLayout& layout, int device);

  CacheView layer(int32_t index) const;
  const KvLayout& layout() const override { return layout_; }

  // All three throw CudaError too. A block is copied through pinned memory.
  void zero(std::span<const int32_t> blocks) override;
  void read(int32_t layer, int32_t block, std::span<float> values) override;
  void write(int32_t layer, int32_t block, std::span<const float> values) override;

  // Of all layers. Throws as the constructor.
  static size_t bytes_per_block(const KvLayout& layout);

 private:
  Bf16* block_at(int32_t layer, int32_t block) const;

  const KvLayout layout_;
  const int device_;
  DeviceBuffer memory_;
  PinnedPool pinned_;
  Stream stream_;  // for clearing and copying; segments are launched on another
};

}  // namespace flowprefill
