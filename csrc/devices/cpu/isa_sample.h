// Passes over a row of logits that sample.cc chooses a token by: the largest, weights, their sum,
// those that are large. Included by the .isa.cc files only, see isa_math.h.
#pragma once

#include "devices/cpu/isa_score.h"
#include "graph/sampling_params.h"

namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

// By lanes of plain loops: a maximum is no reduction to a compiler that respects NaN.
inline int32_t most_likely(const float* logits, int n) {
  constexpr int kLanes = 16;
  const float infinity = __builtin_inff();
  float most[kLanes];
  int32_t is_bad[kLanes];
  for (int j = 0; j < kLanes; ++j) {
    most[j] = -infinity;
    is_bad[j] = 0;
  }
  const auto take = [&](int j, float logit) {
    most[j] = logit > most[j] ? logit : most[j];
    is_bad[j] |= logit < infinity ? 0 : 1;  // NaN is not
  };
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j)
      take(j, logits[i + j]);
  }
  for (; i < n; ++i)
    take(0, logits[i]);
  for (int j = 1; j < kLanes; ++j) {
    take(0, most[j]);
    is_bad[0] |= is_bad[j];
  }
  if (is_bad[0] != 0 || most[0] == -infinity)
    return -1;
  int32_t token = 0;
  while (logits[token] != most[0])
    ++token;
  return token;
}

// The largest weigh exactly 1, whatever the rounding of 2^0.
inline void weigh(const float* logits, int n, float top, const SamplingParams& params,
                  float* weights) {
  const float scale = kLog2E / params.temperature;
  int i = 0;
#ifdef __AVX512F__
  const __m512 one = _mm512_set1_ps(1.0f);
  for (; i < n; i += 16) {
    const __m512 x = _mm512_maskz_loadu_ps(lanes(n - i), logits + i);
    const __m512 y = _mm512_sub_ps(x, _mm512_set1_ps(top));
    const __m512 e = _mm512_min_ps(exp2_of(_mm512_mul_ps(y, _mm512_set1_ps(scale))), one);
    const __m512 w =
        _mm512_mask_mov_ps(e, _mm512_cmp_ps_mask(y, _mm512_setzero_ps(), _CMP_EQ_OQ), one);
    const __mmask16 is_left = _mm512_cmp_ps_mask(w, _mm512_set1_ps(params.min_p), _CMP_GE_OQ);
    _mm512_mask_storeu_ps(weights + i, lanes(n - i), _mm512_maskz_mov_ps(is_left, w));
  }
#endif
  for (; i < n; ++i) {
    const float y = (logits[i] - top) * scale;
    float w = exp2_clamped(y);
    w = y < -126.0f ? 0.0f : w;  // -inf is ruled out
    w = w < 1.0f && y < 0.0f ? w : 1.0f;
    weights[i] = w >= params.min_p ? w : 0.0f;
  }
}

inline double sum(const float* x, int n) {
  constexpr int kLanes = 16;
  double sums[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j)
      sums[j] += static_cast<double>(x[i + j]);
  }
  for (; i < n; ++i)
    sums[0] += static_cast<double>(x[i]);
  for (int j = 1; j < kLanes; ++j)
    sums[0] += sums[j];
  return sums[0];
}

// Only blocks whose maximum is so large are looked at one by one.
inline int32_t find_at_least(const float* x, int n, float least, int32_t* found) {
  constexpr int kBlock = 256;
  int32_t count = 0;
  for (int begin = 0; begin < n; begin += kBlock) {
    const int end = begin + kBlock < n ? begin + kBlock : n;
    if (maximum(x + begin, end - begin, 0.0f) < least)
      continue;
    for (int i = begin; i < end; ++i) {
      found[count] = i;
      count += x[i] >= least ? 1 : 0;
    }
  }
  return count;
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
