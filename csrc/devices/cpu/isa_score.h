// What is kept of a row of logits: log-sum-exp, the target's rank, the largest. Included by the
// .isa.cc files only, see isa_math.h.
#pragma once

#include "devices/cpu/isa_math.h"
#include "graph/prompt_score.h"

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

// Largest of s[0, n) and `peak`.
inline float maximum(const float* s, int n, float peak) {
  int i = 0;
#ifdef __AVX512F__
  __m512 most[kChains];
  for (__m512& one : most)
    one = _mm512_set1_ps(peak);
  for (; i + 16 * kChains <= n; i += 16 * kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c)
      most[c] = _mm512_max_ps(most[c], _mm512_loadu_ps(s + i + 16 * c));
  }
  for (; i < n; i += 16) {
    most[0] = _mm512_mask_max_ps(most[0], lanes(n - i), most[0],
                                 _mm512_maskz_loadu_ps(lanes(n - i), s + i));
  }
  return _mm512_reduce_max_ps(
      _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
#else
  constexpr int kLanes = 16;  // by hand: a maximum is no reduction to a compiler that respects NaN
  float most[kLanes];
  for (int j = 0; j < kLanes; ++j)
    most[j] = peak;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j)
      most[j] = s[i + j] > most[j] ? s[i + j] : most[j];
  }
  for (; i < n; ++i)
    most[0] = s[i] > most[0] ? s[i] : most[0];
  for (int j = 0; j < kLanes; ++j)
    peak = most[j] > peak ? most[j] : peak;
  return peak;
#endif
}

// Takes a token in among the largest; of equal logits the first that comes stays ahead.
inline void insert_top(float logit, int32_t id, int32_t& count, PromptScore& out) {
  int32_t i = count < PromptScore::kTop ? count++ : PromptScore::kTop - 1;
  for (; i > 0 && out.top_logits[i - 1] < logit; --i) {
    out.top_logits[i] = out.top_logits[i - 1];
    out.top_ids[i] = out.top_ids[i - 1];
  }
  out.top_logits[i] = logit;
  out.top_ids[i] = id;
}

// Only blocks whose maximum is among the largest so far are looked at one by one.
inline void find_top(const float* logits, int n, PromptScore& out) {
  constexpr int kBlock = 256;
  const float lowest = -__builtin_inff();
  int32_t count = 0;
  for (int begin = 0; begin < n; begin += kBlock) {
    const int end = begin + kBlock < n ? begin + kBlock : n;
    const bool is_full = count == PromptScore::kTop;
    if (is_full && !(maximum(logits + begin, end - begin, lowest) > out.top_logits[count - 1]))
      continue;
    for (int i = begin; i < end; ++i) {
      if (count < PromptScore::kTop || logits[i] > out.top_logits[PromptScore::kTop - 1])
        insert_top(logits[i], i, count, out);
    }
  }
  for (; count < PromptScore::kTop; ++count) {
    out.top_ids[count] = -1;
    out.top_logits[count] = lowest;
  }
}

// Sum of e^(x - peak).
inline float sum_of_exponentials(const float* x, int n, float peak) {
  float sum = 0.0f;
  int i = 0;
#ifdef __AVX512F__
  __m512 sums = _mm512_setzero_ps();
  for (; i < n; i += 16) {
    const __m512 y =
        _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes(n - i), x + i), _mm512_set1_ps(peak));
    const __m512 e = exp2_of(_mm512_mul_ps(y, _mm512_set1_ps(kLog2E)));
    sums = _mm512_mask_add_ps(sums, lanes(n - i), sums, e);
  }
  sum = _mm512_reduce_add_ps(sums);
#endif
  for (; i < n; ++i)
    sum += exp2_clamped((x[i] - peak) * kLog2E);
  return sum;
}

inline void score(const float* logits, int n, int target, PromptScore& out) {
  find_top(logits, n, out);
  const float peak = out.top_logits[0];
  out.log_sum_exp = peak + __builtin_logf(sum_of_exponentials(logits, n, peak));
  out.target_logit = __builtin_nanf("");
  out.rank = 0;
  if (target < 0)
    return;
  out.target_logit = logits[target];
  int32_t larger = 0;
  for (int i = 0; i < n; ++i)
    larger += logits[i] > out.target_logit ? 1 : 0;
  out.rank = larger + 1;
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
