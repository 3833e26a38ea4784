#include "devices/cuda/backend/device_kv_cache.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

namespace flowprefill {
namespace {

constexpr int32_t kMaxBlockTokens = 4096;

KvLayout checked(const KvLayout& layout) {
  const int32_t tokens = layout.block_tokens;
  if (tokens < 2 || tokens > kMaxBlockTokens ||
      !std::has_single_bit(static_cast<uint32_t>(tokens))) {
    throw std::invalid_argument("block_tokens: got " + std::to_string(tokens) +
                                ", expected a power of two, 2 to " +
                                std::to_string(kMaxBlockTokens) + " on CUDA");
  }
  check(layout);
  return layout;
}

}  // namespace

size_t DeviceKvCache::bytes_per_block(const KvLayout& layout) {
  return checked(layout).values_per_block() * static_cast<size_t>(layout.layers) * sizeof(Bf16);
}

DeviceKvCache::DeviceKvCache(const KvLayout& layout, int device)
    : layout_(checked(layout)),
      device_((FP_CUDA(cudaSetDevice(device)), device)),
      memory_(bytes_per_block(layout) * static_cast<size_t>(layout.blocks)),
      pinned_(device),
      stream_(Stream::make()) {}

Bf16* DeviceKvCache::block_at(int32_t layer, int32_t block) const {
  const auto index =
      static_cast<size_t>(layer) * static_cast<size_t>(layout_.blocks) + static_cast<size_t>(block);
  return reinterpret_cast<Bf16*>(memory_.get()) + index * layout_.values_per_block();
}

CacheView DeviceKvCache::layer(int32_t index) const {
  const auto stride = static_cast<int64_t>(layout_.values_per_block());
  return {.keys = block_at(index, 0),
          .values = block_at(index, 0) + stride / 2,
          .block_stride = stride,
          .token_stride = layout_.head_dim,
          .head_stride = int64_t{layout_.block_tokens} * layout_.head_dim,
          .block_shift = std::countr_zero(static_cast<uint32_t>(layout_.block_tokens))};
}

void DeviceKvCache::zero(std::span<const int32_t> blocks) {
  check_blocks(blocks);
  FP_CUDA(cudaSetDevice(device_));
  for (int32_t layer = 0; layer < layout_.layers; ++layer) {
    for (const int32_t block : blocks) {
      FP_CUDA(cudaMemsetAsync(block_at(layer, block), 0, layout_.values_per_block() * sizeof(Bf16),
                              stream_.get()));
    }
  }
  stream_.synchronize();
}

void DeviceKvCache::read(int32_t layer, int32_t block, std::span<float> values) {
  check_place(layer, block, values.size());
  const size_t bytes = values.size() * sizeof(Bf16);
  const PinnedBlock copy = pinned_.take(bytes);
  FP_CUDA(cudaSetDevice(device_));
  FP_CUDA(cudaMemcpyAsync(copy.get(), block_at(layer, block), bytes, cudaMemcpyDeviceToHost,
                          stream_.get()));
  stream_.synchronize();
  const auto* from = reinterpret_cast<const Bf16*>(copy.get());
  std::transform(from, from + values.size(), values.begin(),
                 [](Bf16 value) { return widen(value); });
}

void DeviceKvCache::write(int32_t layer, int32_t block, std::span<const float> values) {
  check_place(layer, block, values.size());
  const size_t bytes = values.size() * sizeof(Bf16);
  const PinnedBlock copy = pinned_.take(bytes);
  std::ranges::transform(values, reinterpret_cast<Bf16*>(copy.get()), to_bf16);
  FP_CUDA(cudaSetDevice(device_));
  FP_CUDA(cudaMemcpyAsync(block_at(layer, block), copy.get(), bytes, cudaMemcpyHostToDevice,
                          stream_.get()));
  stream_.synchronize();
}

}  // namespace flowprefill
