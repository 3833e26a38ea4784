// Sums of 64-bit integers over a block of threads, and the place where a running sum passes a
// value. Used by sample_body.h. Integers, so that no order of adding changes a bit.
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

// Shared memory of block_sums() and passing(): what all threads read in the end, then one sum per
// warp and value. Results have a place of their own, so that a thread may start the next call while
// others still read them; each call's first barrier comes before its own results are written.
constexpr int kMaxSums = 7;
constexpr int32_t sum_words(int32_t threads) {
  return kMaxSums + 1 + kMaxSums * (threads / 32);
}

// Replaces each value by its sum over the block. `scratch`: sum_words() of shared memory.
template <int kCount, class Thread>
FP_HD void block_sums(const Thread& t, uint64_t (&values)[kCount], uint64_t* scratch) {
  static_assert(kCount <= kMaxSums);
  const int32_t warps = t.count() / 32;
  uint64_t* totals = scratch;
  uint64_t* sums = scratch + kMaxSums + 1;
  FP_UNROLL for (int i = 0; i < kCount; ++i) {
    const uint64_t sum = warp_sum(t, values[i]);
    if (t.lane() == 0)
      sums[i * warps + t.warp()] = sum;
  }
  t.sync();
  if (t.index() < kCount) {
    uint64_t total = 0;
    for (int32_t warp = 0; warp < warps; ++warp)
      total += sums[t.index() * warps + warp];
    totals[t.index()] = total;
  }
  t.sync();
  FP_UNROLL for (int i = 0; i < kCount; ++i) values[i] = totals[i];
}

// The first i in [0, n) with of(0) + ... + of(i) > target, in all threads; -1 if there is none.
// `scratch`: sum_words() of shared memory.
template <class Thread, class Of>
FP_HD int32_t passing(const Thread& t, int32_t n, uint64_t target, uint64_t* scratch,
                      const Of& of) {
  const int32_t warps = t.count() / 32;
  const int32_t chunk = (n + t.count() - 1) / t.count() * 32;  // consecutive, one per warp
  const int32_t begin = smaller(t.warp() * chunk, n);
  const int32_t end = smaller(begin + chunk, n);
  uint64_t sum = 0;
  for (int32_t i = begin + t.lane(); i < end; i += 32)
    sum += of(i);
  sum = warp_sum(t, sum);
  auto* found = reinterpret_cast<int32_t*>(scratch + kMaxSums);
  uint64_t* sums = scratch + kMaxSums + 1;
  if (t.lane() == 0)
    sums[t.warp()] = sum;
  t.sync();
  uint64_t before = 0;
  uint64_t total = 0;
  for (int32_t warp = 0; warp < warps; ++warp) {
    before += warp < t.warp() ? sums[warp] : 0;
    total += sums[warp];
  }
  if (before <= target && target < before + sum) {  // the same for the whole warp, and one warp
    for (int32_t from = begin; before <= target; from += 32) {
      const int32_t i = from + t.lane();
      const uint64_t mine = i < end ? of(i) : 0;
      uint64_t running = mine;
      const uint64_t all = warp_running_sum(t, &running);
      if (before + running - mine <= target && target < before + running)
        *found = i;
      before += all;
    }
  }
  t.sync();
  return target < total ? *found : -1;
}

}  // namespace flowprefill
