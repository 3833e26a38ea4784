#include "devices/cuda/backend/device_kv_cache.h"

#include <bit>
#include <stdexcept>
#include <string>

namespace flowprefill {
namespace {

constexpr int32_t kMaxBlockTokens = 4096;

int32_t checked_tokens(int32_t block_tokens) {
  if (block_tokens < 1 || block_tokens > kMaxBlockTokens ||
      !std::has_single_bit(static_cast<uint32_t>(block_tokens))) {
    throw std::invalid_argument("block_tokens: got " + std::to_string(block_tokens) +
                                ", expected a power of two up to " +
                                std::to_string(kMaxBlockTokens) + " on CUDA");
  }
  return block_tokens;
}

int32_t checked_blocks(int32_t blocks) {
  if (blocks < 1)
    throw std::invalid_argument("blocks: got " + std::to_string(blocks) + ", expected at least 1");
  return blocks;
}

}  // namespace

size_t DeviceKvCache::bytes_per_block(const ModelConfig& config, int32_t block_tokens) {
  return size_t{2} * sizeof(Bf16) * static_cast<size_t>(config.num_layers) *
         static_cast<size_t>(config.kv_columns()) *
         static_cast<size_t>(checked_tokens(block_tokens));
}

DeviceKvCache::DeviceKvCache(const ModelConfig& config, int device, int32_t block_tokens,
                             int32_t blocks)
    : device_((FP_CUDA(cudaSetDevice(device)), device)),
      layers_(config.num_layers),
      kv_heads_(config.num_kv_heads),
      head_dim_(config.head_dim),
      block_tokens_(checked_tokens(block_tokens)),
      blocks_(checked_blocks(blocks)),
      memory_(bytes_per_block(config, block_tokens) * static_cast<size_t>(blocks)),
      stream_(Stream::make()) {}

CacheView DeviceKvCache::layer(int32_t index) const {
  const int64_t half = int64_t{kv_heads_} * block_tokens_ * head_dim_;  // elements: K or V
  Bf16* keys = reinterpret_cast<Bf16*>(memory_.get()) + index * (2 * half) * blocks_;
  return {.keys = keys,
          .values = keys + half,
          .block_stride = 2 * half,
          .token_stride = head_dim_,
          .head_stride = int64_t{block_tokens_} * head_dim_,
          .block_shift = std::countr_zero(static_cast<uint32_t>(block_tokens_))};
}

void DeviceKvCache::zero(std::span<const int32_t> blocks) {
  for (const int32_t block : blocks) {
    if (block < 0 || block >= blocks_) {
      throw std::invalid_argument("blocks: got " + std::to_string(block) + ", expected 0.." +
                                  std::to_string(blocks_ - 1));
    }
  }
  FP_CUDA(cudaSetDevice(device_));
  for (int32_t i = 0; i < layers_; ++i) {
    const CacheView view = layer(i);
    for (const int32_t block : blocks) {
      FP_CUDA(cudaMemsetAsync(view.keys + block * view.block_stride, 0,
                              static_cast<size_t>(view.block_stride) * sizeof(Bf16),
                              stream_.get()));
    }
  }
  stream_.synchronize();
}

}  // namespace flowprefill
