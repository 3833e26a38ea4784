// Body of the sampling kernel: the most likely token of a row, or a random one. Called by sample.cu
// on the device and by tests/cpp/kernels on the host.
//
// The order of filters, and of tokens when drawing, is that of flowprefill/engine/sampler.py:
// temperature, min_p, top_k, top_p, each among what the one before left; of equally likely tokens
// those with lower ids stay; then the distribution in order of ids is inverted. The same uniform
// number so gives the same token, unless it, or a threshold, falls within the rounding of the
// weights. Here a weight is a fixed-point number of 40 bits below the largest: sums are exact and
// do not depend on the order of adding, so a row gives the same token in any batch.
#pragma once

#include "devices/cuda/kernels/block_sums.h"
#include "devices/cuda/kernels/sample_args.h"

namespace flowprefill {

// Bits of a threshold found in one pass over the row; each takes a sum for every value they have.
constexpr int kBitsPerPass = 3;
constexpr int kSumsPerPass = (1 << kBitsPerPass) - 1;
static_assert(kSumsPerPass <= kMaxSums);

constexpr int32_t sample_shared_bytes(int32_t threads) {
  return sum_words(threads) * static_cast<int32_t>(sizeof(uint64_t));
}

// A number that orders logits as their values do; NaN aside. -0 equals 0.
FP_HD uint32_t order_of(float logit) {
  const uint32_t bits = bits_of(logit + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
FP_HD float logit_of(uint32_t order) {
  return float_of((order & 0x80000000u) != 0 ? order & 0x7fffffffu : ~order);
}

// One row and which of its tokens are left.
struct SampledRow {
  const float* logits;
  int32_t width;
  float top;                 // the largest logit
  float log2_scale;          // log2(e) / temperature
  float least_weight;        // min_p
  uint32_t least_order = 0;  // what is ordered below is out, and of what equals it ids beyond
  int32_t last_id;

  FP_HD float weight(float logit) const { return exp2_of((logit - top) * log2_scale); }
  FP_HD bool has(float logit, int32_t id) const {
    const uint32_t order = order_of(logit);
    return weight(logit) >= least_weight &&
           (order > least_order || (order == least_order && id <= last_id));
  }
};

// What a token counts for.
struct OneEach {
  FP_HD uint64_t operator()(const SampledRow&, float) const { return 1; }
};
struct ItsWeight {
  FP_HD uint64_t operator()(const SampledRow& row, float logit) const {
    return static_cast<uint64_t>(row.weight(logit) * 1099511627776.0f);  // 2^40
  }
};

// Sum over the tokens that are left.
template <class Counted, class Thread>
FP_HD uint64_t total_of(const Thread& t, const SampledRow& row, uint64_t* scratch) {
  uint64_t sum[1] = {0};
  for (int32_t id = t.index(); id < row.width; id += t.count()) {
    const float logit = row.logits[id];
    sum[0] += row.has(logit, id) ? Counted()(row, logit) : 0;
  }
  block_sums(t, sum, scratch);
  return sum[0];
}

// Leaves the fewest most likely tokens that count for at least `wanted`, 1 <= wanted <= the total.
template <class Counted, class Thread>
FP_HD void keep_most_likely(const Thread& t, uint64_t wanted, SampledRow* row, uint64_t* scratch) {
  // The largest order with enough at or above it, from the highest bits down.
  uint32_t order = 0;
  uint64_t above = 0;  // counted beyond what the bits so far can reach
  for (int shift = 30; shift >= 0; shift -= kBitsPerPass) {
    uint64_t sums[kSumsPerPass] = {};  // [i]: at or above order + (i + 1 << shift)
    for (int32_t id = t.index(); id < row->width; id += t.count()) {
      const float logit = row->logits[id];
      const uint32_t its = order_of(logit);
      if (its < order || !row->has(logit, id))
        continue;
      const uint32_t step = (its - order) >> shift;
      const uint64_t counted = Counted()(*row, logit);
      FP_UNROLL for (uint32_t i = 0; i < kSumsPerPass; ++i) sums[i] += step > i ? counted : 0;
    }
    block_sums(t, sums, scratch);
    uint32_t taken = 0;
    FP_UNROLL for (uint32_t i = 0; i < kSumsPerPass; ++i) taken += sums[i] >= wanted ? 1 : 0;
    FP_UNROLL for (uint32_t i = 0; i < kSumsPerPass; ++i) above = i == taken ? sums[i] : above;
    order += taken << shift;
  }
  // Of the equal ones at the threshold, so many that it is enough.
  const uint64_t each = Counted()(*row, logit_of(order));
  const uint64_t needed = (wanted - above + each - 1) / each;
  const int32_t last = passing(t, row->width, needed - 1, scratch, [row, order](int32_t id) {
    const float logit = row->logits[id];
    return order_of(logit) == order && row->has(logit, id) ? uint64_t{1} : uint64_t{0};
  });
  row->least_order = order;
  row->last_id = last;
}

// The largest logit and its first token; kNoToken for a row without an answer. The same in all
// threads.
template <class Thread>
FP_HD int32_t most_likely(const Thread& t, const float* logits, int32_t width, uint64_t* scratch,
                          float* top) {
  float best = minus_infinity();
  int32_t token = width;
  int32_t is_bad = 0;
  const auto take = [&best, &token](float value, int32_t id) {
    if (value > best || (value == best && id < token)) {
      best = value;
      token = id;
    }
  };
  for (int32_t id = t.index(); id < width; id += t.count()) {
    const float value = logits[id];
    is_bad |= value < -minus_infinity() ? 0 : 1;  // NaN is not
    take(value, id);
  }
  FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const float value = t.shuffle_xor(best, mask);
    take(value, t.shuffle_xor(token, mask));
    is_bad |= t.shuffle_xor(is_bad, mask);
  }
  const int32_t warps = t.count() / 32;
  auto* values = reinterpret_cast<float*>(scratch);
  auto* tokens = reinterpret_cast<int32_t*>(values + warps);
  if (t.lane() == 0) {
    values[t.warp()] = best;
    tokens[t.warp()] = is_bad != 0 ? kNoToken : token;
  }
  t.sync();
  for (int32_t warp = 0; warp < warps; ++warp) {
    is_bad |= tokens[warp] == kNoToken ? 1 : 0;
    take(values[warp], tokens[warp]);
  }
  t.sync();  // scratch may be written again
  *top = best;
  return is_bad != 0 || best == minus_infinity() ? kNoToken : token;
}

template <class Thread>
FP_HD int32_t draw(const Thread& t, const SamplingParams& params, SampledRow* row,
                   uint64_t* scratch) {
  if (params.top_k > 0 && params.top_k < row->width) {
    const auto wanted = static_cast<uint64_t>(params.top_k);
    if (wanted < total_of<OneEach>(t, *row, scratch))
      keep_most_likely<OneEach>(t, wanted, row, scratch);
  }
  uint64_t total = total_of<ItsWeight>(t, *row, scratch);
  if (params.top_p < 1.0f) {
    const double share = static_cast<double>(params.top_p) * static_cast<double>(total);
    auto wanted = static_cast<uint64_t>(share > 1.0 ? share : 1.0);
    wanted += static_cast<double>(wanted) < share ? 1 : 0;
    keep_most_likely<ItsWeight>(t, wanted < total ? wanted : total, row, scratch);
    total = total_of<ItsWeight>(t, *row, scratch);
  }
  // A uniform number that was rounded up to 1 means the last one.
  const double at = static_cast<double>(params.uniform) * static_cast<double>(total);
  const auto target = static_cast<uint64_t>(at > 0.0 ? at : 0.0);
  return passing(t, row->width, target < total ? target : total - 1, scratch, [row](int32_t id) {
    const float logit = row->logits[id];
    return row->has(logit, id) ? ItsWeight()(*row, logit) : uint64_t{0};
  });
}

// One row per block_x(). Shared memory: sample_shared_bytes().
template <class Thread>
FP_HD void sample_body(const Thread& t, const SampleArgs& args) {
  const int32_t at = t.block_x();
  int32_t token = kNoToken;
  if (args.rows_in == nullptr || args.rows_in[at] >= 0) {  // the same for the whole block
    auto* scratch = t.template shared<uint64_t>();
    const SamplingParams params = args.params[at];
    SampledRow row = {.logits = args.logits + at * args.ld_logits,
                      .width = args.width,
                      .top = 0.0f,
                      .log2_scale = 1.44269504088896340736f / params.temperature,
                      .least_weight = params.min_p,
                      .last_id = args.width};
    token = most_likely(t, row.logits, row.width, scratch, &row.top);
    if (token != kNoToken && params.temperature >= kGreedyBelow)
      token = draw(t, params, &row, scratch);
  }
  if (t.index() == 0)
    args.out[at] = token;
}

}  // namespace flowprefill
