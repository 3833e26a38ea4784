// Body of the sampling kernel: the most likely token of a row, or a random one. Called by sample.cu
// on the device and by tests/cpp/kernels on the host.
//
// The order of filters, and of tokens when drawing, is that of flowprefill/engine/sampler.py:
// temperature, min_p, top_k, top_p, each among what the one before left; of equally likely tokens
// those with lower ids stay; then the distribution in order of ids is inverted. The same uniform
// number so gives the same token, unless it, or a threshold, falls within the rounding of the
// weights. Here a weight is a fixed-point number of 40 bits below the largest: sums are exact and
// do not depend on the order of adding, so a row gives the same token in any batch.
//
// After the pass for the largest logit there are two ways, with the same choice. Mostly min_p or
// top_k leave candidates for one list in shared memory, one for each thread: all is decided there.
// Otherwise passes over the row follow.
#pragma once

#include "devices/cuda/kernels/sample_filters.h"

namespace flowprefill {

// What tokens have to weigh together for top_p, of `total`; at least 1.
FP_HD uint64_t share_of(float top_p, uint64_t total) {
  const double share = static_cast<double>(top_p) * static_cast<double>(total);
  auto wanted = static_cast<uint64_t>(share > 1.0 ? share : 1.0);
  wanted += static_cast<double>(wanted) < share ? 1 : 0;
  return wanted < total ? wanted : total;
}

// The weight that the drawn token's passes. A uniform number that was rounded up to 1 means the
// last token.
FP_HD uint64_t target_of(float uniform, uint64_t total) {
  const double at = static_cast<double>(uniform) * static_cast<double>(total);
  const auto target = static_cast<uint64_t>(at > 0.0 ? at : 0.0);
  return target < total ? target : total - 1;
}

// From a list of `n` weights with all tokens that top_k, top_p and the draw can take.
template <class Thread>
FP_HD int32_t draw_from_list(const Thread& t, const SamplingParams& params, int32_t n,
                             const SampleScratch& s) {
  const bool is_mine = t.index() < n;
  const Candidate mine = is_mine ? s.list[t.index()] : Candidate{0, 0};
  Above over;
  if (is_mine && (params.top_k > 0 || params.top_p < 1.0f))
    over = above(s.list, n, mine.key);
  bool is_left = is_mine && (params.top_k <= 0 || over.tokens < params.top_k);
  uint64_t total = block_sum(t, is_left ? mine.counts : 0, s.sums);
  if (params.top_p < 1.0f) {
    is_left = is_left && over.count < share_of(params.top_p, total);
    total = block_sum(t, is_left ? mine.counts : 0, s.sums);
  }
  if (is_mine && !is_left)
    s.list[t.index()].counts = 0;
  t.sync();
  if (is_left) {
    const uint64_t target = target_of(params.uniform, total);
    uint64_t before = 0;
    for (int32_t i = 0; i < n; ++i)
      before += s.list[i].id() < mine.id() ? s.list[i].counts : 0;
    if (before <= target && target < before + mine.counts)  // one thread
      *s.index = mine.id();
  }
  t.sync();
  return *s.index;
}

// The last bin up to which there are at least top_k tokens, by the largest of each tile alone, or
// kLastBin; -1 if they surely are too many for a list.
template <class Thread>
FP_HD int32_t last_bin_of_list(const Thread& t, int32_t top_k, const SampledRow& row,
                               const SampleScratch& s) {
  clear_bins(t, s);
  for (int32_t tile = 0; tile * row.groups_of_tile < row.groups; ++tile) {
    const float largest = largest_of_tile(t, s.largest, tile);
    if (row.parts(largest).value() != 0)
      add_to_bin(t, s, row.bin(largest), 1);
  }
  const FoundBin found = find_bin(
      t, s, [top_k](uint64_t) { return top_k > 0 ? static_cast<uint64_t>(top_k) : ~uint64_t{0}; });
  if (found.with > static_cast<uint64_t>(t.count()))
    return -1;
  return found.bin < 0 ? kLastBin : found.bin;
}

template <class Thread>
FP_HD int32_t draw(const Thread& t, const SamplingParams& params, SampledRow* row,
                   const SampleScratch& s) {
  const int32_t last = last_bin_of_list(t, params.top_k, *row, s);
  if (last >= 0) {
    const int32_t n = fill_list(t, Counted::kItsWeight, *row, s, 0, last);
    if (n <= t.count())
      return draw_from_list(t, params, n, s);
  }
  FP_ROLLED for (int filter = 0; filter < 2; ++filter) {
    const bool is_top_k = filter == 0;
    const Counted counted = is_top_k ? Counted::kOneEach : Counted::kItsWeight;
    if (is_top_k ? params.top_k <= 0 || params.top_k >= row->width : params.top_p >= 1.0f)
      continue;
    const auto wanted_of = [&params, is_top_k](uint64_t total) {
      return is_top_k ? static_cast<uint64_t>(params.top_k) : share_of(params.top_p, total);
    };
    keep_most_likely(t, counted, wanted_of, row, s);
  }
  return find_in_row(
      t, *row, s, [](const Parts& parts, float) { return parts; },
      [&params](uint64_t total) { return target_of(params.uniform, total); });
}

// One row per block_x(). Shared memory: sample_shared_bytes().
template <class Thread>
FP_HD void sample_body(const Thread& t, const SampleArgs& args) {
  const int32_t at = t.block_x();
  int32_t token = kNoToken;
  if (args.rows_in == nullptr || args.rows_in[at] >= 0) {  // the same for the whole block
    const SampleScratch scratch = scratch_of(t);
    const SamplingParams params = args.params[at];
    SampledRow row = row_of(t, args, at);
    token = most_likely(t, &row, scratch.largest, scratch.sums);
    if (token != kNoToken && params.temperature >= kGreedyBelow) {
      row.log2_scale = 1.44269504088896340736f / params.temperature;
      row.least_weight = params.min_p;
      token = draw(t, params, &row, scratch);
    }
  }
  if (t.index() == 0)
    args.out[at] = token;
}

}  // namespace flowprefill
