// DeviceKvCache: keys and values of all layers on the GPU, in blocks of a power of two of tokens.
// Owned by CudaModel; which block belongs to whom is accounted in Python (engine/kv_blocks.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "devices/cuda/kernels/batch_view.h"
#include "devices/cuda/runtime/memory.h"
#include "devices/cuda/runtime/stream.h"
#include "graph/model_config.h"

namespace flowprefill {

// [layer][block]{K, V}[kv head][token][head_dim] bf16: a head's tokens lie side by side, as the
// attention kernel reads them, and a block's keys and values of a layer are one piece.
class DeviceKvCache {
 public:
  // Throws std::invalid_argument unless block_tokens is a power of two (at most 4096) and blocks >=
  // 1; CudaError.
  DeviceKvCache(const ModelConfig& config, int device, int32_t block_tokens, int32_t blocks);

  CacheView layer(int32_t index) const;
  int32_t block_tokens() const { return block_tokens_; }
  int32_t blocks() const { return blocks_; }

  // Clears them and waits for it. Throws std::invalid_argument for a block it has not. Thread: any.
  void zero(std::span<const int32_t> blocks);

  // Of all layers. Throws as the constructor.
  static size_t bytes_per_block(const ModelConfig& config, int32_t block_tokens);

 private:
  const int device_;
  const int32_t layers_;
  const int32_t kv_heads_;
  const int32_t head_dim_;
  const int32_t block_tokens_;
  const int32_t blocks_;
  DeviceBuffer memory_;
  Stream stream_;  // for clearing: beside what the executor launches
};

}  // namespace flowprefill
