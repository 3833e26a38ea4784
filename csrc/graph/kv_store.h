// KvStore: the keys and values of all layers on one device, in blocks of tokens. Which block
// belongs to whom is accounted in Python (engine/kv_blocks.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace flowprefill {

struct KvLayout {
  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_tokens = 0;
  int32_t blocks = 0;

  // Values of one block of one layer: keys [kv_heads, block_tokens, head_dim], then values alike.
  size_t values_per_block() const {
    return size_t{2} * static_cast<size_t>(kv_heads) * static_cast<size_t>(block_tokens) *
           static_cast<size_t>(head_dim);
  }
};

// Blocks are read and written as float, whatever a device keeps, in the order of
// values_per_block(); writing what was read gives the same bits.
//
// Thread: any, on blocks that no live run uses.
class KvStore {
 public:
  virtual ~KvStore() = default;

  virtual const KvLayout& layout() const = 0;

  // Clears blocks and waits until they are clear. Throws std::invalid_argument for a block it has
  // not.
  virtual void zero(std::span<const int32_t> blocks) = 0;

  // Copies one block of one layer to or from `values`, layout().values_per_block() of them; waits.
  // Throws std::invalid_argument for a layer or block it has not.
  virtual void read(int32_t layer, int32_t block, std::span<float> values) = 0;
  virtual void write(int32_t layer, int32_t block, std::span<const float> values) = 0;

 protected:
  // Throw std::invalid_argument naming what is out of range.
  void check_blocks(std::span<const int32_t> blocks) const;
  void check_place(int32_t layer, int32_t block, size_t num_values) const;
};

// Throws std::invalid_argument unless block_tokens is even and at least 2 and there are blocks.
void check(const KvLayout& layout);

}  // namespace flowprefill
