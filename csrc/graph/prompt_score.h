// PromptScore: what is kept of the logits of one row of a prompt. Written by devices, read by
// Python (flowprefill/engine/prompt_logprobs.py) as it lies in memory.
#pragma once

#include <cstdint>

namespace flowprefill {

// Log-probabilities are logits less log_sum_exp.
struct PromptScore {
  static constexpr int32_t kTop = 20;
  static constexpr int32_t kColumns = 3 + 2 * kTop;

  float log_sum_exp = 0;        // natural logarithm; NaN if a logit is
  float target_logit = 0;       // of the token that follows; NaN where none does
  int32_t rank = 0;             // of that token, 1: no logit is larger; 0 where none follows
  int32_t top_ids[kTop] = {};   // of the largest logits, largest first, of equal ones the lowest id
  float top_logits[kTop] = {};  // behind the vocabulary's end: id -1
};
static_assert(sizeof(PromptScore) == sizeof(float) * PromptScore::kColumns);

}  // namespace flowprefill
