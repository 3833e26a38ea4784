// Bodies of the kernels that keep something of all rows: scores and means. Called by score.cu on
// the device and by tests/cpp/kernels on the host. What a score holds: graph/prompt_score.h.
#pragma once

#include "devices/cuda/kernels/score_args.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

// A logit and its token; the vocabulary's end: none. NaN is never one.
struct RankedToken {
  float logit;
  int32_t id;

  // Whether it comes before the other: of equal logits the lower id.
  FP_HD bool precedes(const RankedToken& other) const {
    return logit > other.logit || (logit == other.logit && id < other.id);
  }
};

constexpr int32_t score_shared_bytes(int32_t threads) {
  return 3 * (threads / 32) * static_cast<int32_t>(sizeof(float));
}

FP_HD float natural_log(float x) {
#if FP_ON_DEVICE
  return logf(x);
#else
  return std::log(x);
#endif
}

// The first of this thread's tokens that come after `last`.
template <class Thread>
FP_HD RankedToken next_of_thread(const Thread& t, const float* logits, int32_t width,
                                 const RankedToken& last) {
  RankedToken best = {minus_infinity(), width};
  for (int32_t id = t.index(); id < width; id += t.count()) {
    const RankedToken token = {logits[id], id};
    if (last.precedes(token) && token.precedes(best))
      best = token;
  }
  return best;
}

// The first of all threads', the same in every thread. `scratch`: shared, two words a warp.
template <class Thread>
FP_HD RankedToken first_of_block(const Thread& t, RankedToken token, float* scratch) {
  FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) {
    const float logit = t.shuffle_xor(token.logit, mask);
    const RankedToken other = {logit, t.shuffle_xor(token.id, mask)};
    token = other.precedes(token) ? other : token;
  }
  const int32_t warps = t.count() / 32;
  auto* ids = reinterpret_cast<int32_t*>(scratch + warps);
  if (t.lane() == 0) {
    scratch[t.warp()] = token.logit;
    ids[t.warp()] = token.id;
  }
  t.sync();
  for (int32_t warp = 0; warp < warps; ++warp) {
    const RankedToken other = {scratch[warp], ids[warp]};
    token = other.precedes(token) ? other : token;
  }
  t.sync();  // scratch may be written again
  return token;
}

// The token after a row of the step; -1: it is not known.
FP_HD int32_t token_after(const ScoreArgs& args, int32_t row) {
  const int32_t sequence = args.batch.sequences[row];
  const bool has_next = row + 1 < args.batch_rows && args.batch.sequences[row + 1] == sequence;
  return has_next ? args.batch.tokens[row + 1] : args.next_tokens[sequence - 1];
}

// out[row] of block_x() = row. Each thread holds the first of its own tokens; the one whose came
// first of all looks through its own again for the next. Sums are added in an order that depends on
// the number of threads alone. Shared memory: score_shared_bytes().
template <class Thread>
FP_HD void score_body(const Thread& t, const ScoreArgs& args) {
  const int32_t row = t.block_x();
  if (args.batch.sequences[row] <= 0)  // the same for the whole block
    return;
  const float* logits = args.logits + row * args.ld_logits;
  PromptScore& out = args.out[row];
  auto* scratch = t.template shared<float>();
  RankedToken mine = next_of_thread(t, logits, args.width, {-minus_infinity(), -1});
  float top = 0.0f;
  for (int32_t i = 0; i < PromptScore::kTop; ++i) {
    const RankedToken first = first_of_block(t, mine, scratch);
    const bool is_token = first.id < args.width;
    top = i == 0 ? first.logit : top;
    if (t.index() == 0) {
      out.top_ids[i] = is_token ? first.id : -1;
      out.top_logits[i] = first.logit;
    }
    if (is_token && mine.id == first.id)
      mine = next_of_thread(t, logits, args.width, first);
  }
  const int32_t target = token_after(args, row);
  const float target_logit = target < 0 ? float_of(0x7fc00000u) : logits[target];
  constexpr float kLog2E = 1.44269504088896340736f;
  float sum = 0.0f;
  float larger = 0.0f;
  for (int32_t id = t.index(); id < args.width; id += t.count()) {
    sum += exp2_of((logits[id] - top) * kLog2E);  // NaN if the logit is, or all are -inf
    larger += logits[id] > target_logit ? 1.0f : 0.0f;
  }
  sum = block_sum(t, sum, scratch);
  larger = block_sum(t, larger, scratch + t.count() / 32);
  if (t.index() != 0)
    return;
  out.log_sum_exp = top + natural_log(sum);
  out.target_logit = target_logit;
  out.rank = target < 0 ? 0 : static_cast<int32_t>(larger) + 1;
}

// One column a thread; block_x(): which. Rows are added in their order, whatever the steps.
template <class Thread>
FP_HD void pool_body(const Thread& t, const PoolArgs& args) {
  const int32_t column = t.block_x() * t.count() + t.index();
  if (column >= args.width)
    return;
  for (int32_t row = 0; row < args.rows;) {
    const int32_t sequence = args.batch.sequences[row] - 1;
    if (sequence < 0)
      return;  // padding is at the end
    const int32_t first = sequence == 0 ? 0 : args.last_rows[sequence - 1] + 1;
    const int32_t last = args.last_rows[sequence];
    const float share = 1.0f / static_cast<float>(last + 1 - first);
    float* mean = args.out + sequence * args.ld_out + column;
    float sum = args.row_begin + row == first ? 0.0f : *mean;
    for (; row < args.rows && args.row_begin + row <= last; ++row)
      sum += args.in[row * args.ld_in + column] * share;
    *mean = sum;
  }
}

}  // namespace flowprefill
