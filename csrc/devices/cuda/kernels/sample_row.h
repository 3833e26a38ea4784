// One row of logits as a block of threads samples from it: which tokens are left, what they weigh,
// and passes over the row that leave out the parts without any. Used by sample_filters.h.
//
// A row is read in groups of 16 logits a thread: a warp's groups are consecutive, and within a
// group four loads of 16 bytes take 512 consecutive logits of the warp. Some groups are a tile; its
// largest logit, found by the first pass, stays in shared memory, and later passes read a tile only
// if that logit is among those they look for. Mostly few are.
#pragma once

#include "devices/cuda/kernels/block_sums.h"
#include "devices/cuda/kernels/sample_args.h"

namespace flowprefill {

constexpr int32_t kGroup = 16;  // logits that a thread loads at once
constexpr int32_t kGroupOfWarp = 32 * kGroup;
constexpr int32_t kTilesOfThread = 4;
// Bins by how far a logit lies below the largest one, so many for each halving of its weight. The
// last that a weight above zero falls into is kLastBin.
constexpr int32_t kBins = 3072;
constexpr int32_t kBinsOfHalving = 75;
constexpr int32_t kWeightBits = 40;
constexpr int32_t kLastBin = kWeightBits * kBinsOfHalving;
static_assert(kLastBin < kBins - 1);

// A number that orders logits as their values do; NaN aside. -0 equals 0.
FP_HD uint32_t order_of(float logit) {
  const uint32_t bits = bits_of(logit + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
FP_HD float logit_of(uint32_t order) {
  return float_of((order & 0x80000000u) != 0 ? order & 0x7fffffffu : ~order);
}

// A number of 40 bits and one more: high * 2^20 + low. Some thousand may be added up before either
// overflows.
struct Parts {
  uint32_t high = 0;
  uint32_t low = 0;

  FP_HD uint64_t value() const { return (static_cast<uint64_t>(high) << 20) + low; }
};

// weight * 2^40, rounded down; 0 <= weight <= 1.
FP_HD Parts parts_of(float weight) {
#if FP_ON_DEVICE
  // The unit in the last place of 8 is 2^-20, that of 2^-17 is 2^-40: adding them, rounded towards
  // zero, leaves the number of units in the lowest bits. Conversions would take four times as long.
  constexpr float kTiny = 7.62939453125e-6f;
  const float upper = __fadd_rz(weight, 8.0f);
  const float lower = __fadd_rz(weight - (upper - 8.0f), kTiny);
  return {bits_of(upper) - bits_of(8.0f), bits_of(lower) - bits_of(kTiny)};
#else
  const auto fixed = static_cast<uint64_t>(weight * 1099511627776.0f);
  return {static_cast<uint32_t>(fixed >> 20), static_cast<uint32_t>(fixed & 0xfffff)};
#endif
}

// One row and which of its tokens are left. Tokens that weigh less than 2^-40 never are: they come
// after all others and add nothing, so no choice depends on them.
struct SampledRow {
  const float* logits;
  int32_t width;
  int32_t groups;  // of a thread
  int32_t groups_of_tile;
  bool is_aligned;            // to 16 bytes
  float top = 0.0f;           // the largest logit
  float log2_scale = 0.0f;    // log2(e) / temperature
  float least_weight = 0.0f;  // min_p
  uint32_t least_order = 0;   // what is ordered below is out, and of what equals it ids beyond
  int32_t last_id;

  FP_HD float weight(float logit) const { return exp2_of((logit - top) * log2_scale); }
  FP_HD int32_t bin(float logit) const {
    const float below = (top - logit) * log2_scale;
    return static_cast<int32_t>(fminf(below * kBinsOfHalving, kBins - 1.0f));
  }
  FP_HD bool is_beyond(float logit, int32_t id) const {
    const uint32_t order = order_of(logit);
    return order < least_order || (order == least_order && id > last_id);
  }
  // Of a token's weight; nothing if it is out. Without id: in a row that is not cut.
  FP_HD Parts parts(float logit) const {
    const float its = weight(logit);
    return its >= least_weight ? parts_of(its) : Parts{};
  }
  FP_HD Parts parts(float logit, int32_t id) const {
    return is_beyond(logit, id) ? Parts{} : parts(logit);
  }
  FP_HD bool is_cut() const { return least_order > 0; }
  // Whether a tile with that largest logit may have a token that is left, within bins up to `last`.
  // Leaves room for an exponential that errs.
  FP_HD bool may_have(float largest, int32_t last) const {
    return bin(largest) <= last && order_of(largest) >= least_order &&
           weight(largest) >= 0.999f * least_weight;
  }
};

// What a token counts for: `parts` are those of its weight. Decided at run time, so that the code,
// unrolled as it is, stands there once and not for each.
enum class Counted : uint8_t { kOneEach, kItsWeight };
FP_HD Parts counts_of(Counted counted, const Parts& parts) {
  const Parts one = {0, (parts.high | parts.low) != 0 ? 1u : 0u};
  return counted == Counted::kOneEach ? one : parts;
}

// Row `at`, all of it. What follows from its parameters is set after the first pass, which so need
// not wait for them.
template <class Thread>
FP_HD SampledRow row_of(const Thread& t, const SampleArgs& args, int32_t at) {
  const float* logits = args.logits + at * args.ld_logits;
  const int32_t groups = (args.width - 1) / (kGroup * t.count()) + 1;
  return {.logits = logits,
          .width = args.width,
          .groups = groups,
          .groups_of_tile = (groups - 1) / kTilesOfThread + 1,
          .is_aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0,
          .last_id = args.width};
}

// The id of logit i of this thread's group.
template <class Thread>
FP_HD int32_t id_of(const Thread& t, const SampledRow& row, int32_t group, int32_t i) {
  return (t.warp() * row.groups + group) * kGroupOfWarp + i / 4 * 128 + t.lane() * 4 + i % 4;
}

// Beyond the row: -inf.
template <class Thread>
FP_HD void load_group(const Thread& t, const SampledRow& row, int32_t group, float (&out)[kGroup]) {
  const int32_t first = id_of(t, row, group, 0);
  if (row.is_aligned &&
      first + kGroupOfWarp <= row.width) {  // all loads start before the first ends
    Vec<float, 4> fours[kGroup / 4];
    FP_UNROLL for (int32_t i = 0; i < kGroup / 4; ++i) fours[i] =
        *reinterpret_cast<const Vec<float, 4>*>(row.logits + first + i * 128);
    FP_UNROLL for (int32_t i = 0; i < kGroup; ++i) out[i] = fours[i / 4].v[i % 4];
    return;
  }
  FP_UNROLL for (int32_t i = 0; i < kGroup; ++i) {
    const int32_t id = id_of(t, row, group, i);
    out[i] = id < row.width ? row.logits[id] : minus_infinity();
  }
}

// The largest logit of each of this thread's tiles, its own only. Shared memory.
template <class Thread>
FP_HD float& largest_of_tile(const Thread& t, float* largest, int32_t tile) {
  return largest[tile * t.count() + t.index()];
}

// Calls visit(logits, group) for the groups of tiles that may have tokens that are left, in bins up
// to `last`, until it returns false.
template <class Thread, class Visit>
FP_HD void visit_groups(const Thread& t, const SampledRow& row, float* largest, int32_t last,
                        const Visit& visit) {
  for (int32_t tile = 0, begin = 0; begin < row.groups; ++tile, begin += row.groups_of_tile) {
    if (!row.may_have(largest_of_tile(t, largest, tile), last))
      continue;
    const int32_t end = smaller(begin + row.groups_of_tile, row.groups);
    for (int32_t group = begin; group < end; ++group) {
      float logits[kGroup];
      load_group(t, row, group, logits);
      if (!visit(logits, group))
        return;
    }
  }
}

// The first pass: sets row->top and the tiles' largest logits; returns the first token of the
// largest, or kNoToken for a row without an answer. The same in all threads.
template <class Thread>
FP_HD int32_t most_likely(const Thread& t, SampledRow* row, float* largest, uint64_t* scratch) {
  float best = minus_infinity();
  int32_t best_group = 0;
  bool is_bad = false;
  float of_tile = minus_infinity();
  int32_t tile = 0;
  for (int32_t group = 0, left = row->groups_of_tile; group < row->groups; ++group) {
    float logits[kGroup];
    load_group(t, *row, group, logits);
    float of_group = minus_infinity();
    FP_UNROLL for (int32_t i = 0; i < kGroup; ++i) {
      is_bad |= !(logits[i] < -minus_infinity());  // NaN is not
      of_group = fmaxf(of_group, logits[i]);
    }
    best_group = of_group > best ? group : best_group;
    best = fmaxf(best, of_group);
    of_tile = fmaxf(of_tile, of_group);
    if (--left == 0 || group + 1 == row->groups) {
      largest_of_tile(t, largest, tile++) = of_tile;
      of_tile = minus_infinity();
      left = row->groups_of_tile;
    }
  }
  const uint32_t order = block_largest(t, is_bad ? ~0u : order_of(best), scratch);
  if (order == ~0u || order == order_of(minus_infinity()))
    return kNoToken;
  row->top = logit_of(order);
  uint32_t id = ~0u;
  if (best == row->top) {
    float logits[kGroup];
    load_group(t, *row, best_group, logits);
    FP_UNROLL for (int32_t i = kGroup - 1; i >= 0; --i) {
      id = logits[i] == best ? static_cast<uint32_t>(id_of(t, *row, best_group, i)) : id;
    }
  }
  return static_cast<int32_t>(~block_largest(t, ~id, scratch));
}

}  // namespace flowprefill
