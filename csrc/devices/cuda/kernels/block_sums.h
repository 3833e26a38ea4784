// Sums of 64-bit integers over a block of threads, in the order of threads, and its largest number.
// Used by sample_row.h. Integers, so that no order of adding changes a bit.
#pragma once

#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

template <class Thread>
FP_HD uint64_t shuffle_xor(const Thread& t, uint64_t value, int mask) {
  const int32_t low = t.shuffle_xor(static_cast<int32_t>(value & 0xffffffffu), mask);
  const int32_t high = t.shuffle_xor(static_cast<int32_t>(value >> 32), mask);
  return static_cast<uint64_t>(static_cast<uint32_t>(high)) << 32 | static_cast<uint32_t>(low);
}

template <class Thread>
FP_HD uint64_t warp_sum(const Thread& t, uint64_t value) {
  FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(t, value, mask);
  return value;
}

// Replaces `value` by the sum over the lanes up to and with this one; returns the warp's sum.
template <class Thread>
FP_HD uint64_t warp_running_sum(const Thread& t, uint64_t* value) {
  uint64_t total = *value;
  FP_UNROLL for (int mask = 1; mask < 32; mask *= 2) {
    const uint64_t others = shuffle_xor(t, total, mask);
    if ((t.lane() & mask) != 0)
      *value += others;
    total += others;
  }
  return total;
}

// Shared memory of the calls below; it may be used again as soon as they return. At most 32 warps.
constexpr int kSumWords = 33;

// Replaces `value` by the sum over the threads up to and with this one; returns the block's sum.
template <class Thread>
FP_HD uint64_t block_running_sum(const Thread& t, uint64_t* value, uint64_t* scratch) {
  const uint64_t of_warp = warp_running_sum(t, value);
  if (t.lane() == 0)
    scratch[t.warp()] = of_warp;
  t.sync();
  if (t.warp() == 0) {  // what the warps before each have
    const bool is_warp = t.lane() < t.count() / 32;
    const uint64_t mine = is_warp ? scratch[t.lane()] : 0;
    uint64_t running = mine;
    const uint64_t total = warp_running_sum(t, &running);
    if (is_warp)
      scratch[t.lane()] = running - mine;
    if (t.lane() == 0)
      scratch[kSumWords - 1] = total;
  }
  t.sync();
  *value += scratch[t.warp()];
  const uint64_t total = scratch[kSumWords - 1];
  t.sync();
  return total;
}

template <class Thread>
FP_HD uint64_t block_sum(const Thread& t, uint64_t value, uint64_t* scratch) {
  return block_running_sum(t, &value, scratch);
}

template <class Thread>
FP_HD uint32_t warp_largest(const Thread& t, uint32_t value) {
  FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const auto other = static_cast<uint32_t>(t.shuffle_xor(static_cast<int32_t>(value), mask));
    value = other > value ? other : value;
  }
  return value;
}

template <class Thread>
FP_HD uint32_t block_largest(const Thread& t, uint32_t value, uint64_t* scratch) {
  value = warp_largest(t, value);
  if (t.lane() == 0)
    scratch[t.warp()] = value;
  t.sync();
  value = warp_largest(t, t.lane() < t.count() / 32 ? static_cast<uint32_t>(scratch[t.lane()]) : 0);
  t.sync();
  return value;
}

}  // namespace flowprefill
