// Scores that become probabilities in words of 16 bits, for attention on AMX tiles. Included by
// isa_attention_amx.h only.
//
// The bits of a bfloat16 are its logarithm but for the fraction: read as a number with 7 bits
// behind the point they say e + f for 2^e (1 + f). So 2^x is x itself, rounded to 8 such bits, plus
// what f and log2(1 + f) differ by, from a table of 64 steps; the last of the 8 bits rounds it.
// Relative error: root mean square 2.0e-3, at most 7.8e-3; of rounding to bfloat16 alone 1.7e-3
// and 3.9e-3.
//
// While tiles multiply, the processor multiplies, converts, compares and shifts vectors on one port
// only; additions and integers have two, permutations the other one.
#pragma once

#include "devices/cpu/isa_attention_pieces.h"

#ifdef __AVX512BF16__
namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

constexpr int kLogSteps = 256;               // that a word counts in one doubling
constexpr int kWordOfOne = 127 * kLogSteps;  // bfloat16's exponent of 1
constexpr int kMostCorrection =
    22;  // of kLogSteps: taken off every word, so corrections are positive
constexpr float kFloatOfWords =
    12582912.0f;  // 1.5 * 2^23: the lowest bits of a sum with it count ones
constexpr int32_t kBitsOfWords = 0x4b400000;  // its bits
constexpr float kLeastLog = -200.0f;          // of what is 0 anyway

// Corrections of words by the highest 6 bits of their fraction.
struct alignas(64) PowerTable {
  uint8_t of[64];

  constexpr PowerTable() : of{} {
    for (int i = 0; i < 64; ++i) {
      const double steps = 4 * i + 1.5 + kMostCorrection;
      const double f = (steps >= kLogSteps ? steps - kLogSteps : steps) / kLogSteps;
      double power = 1.0;  // 2^f by its series
      double term = 1.0;
      for (int n = 1; n < 20; ++n) {
        term *= f * 0.693147180559945309 / n;
        power += term;
      }
      const double correction = kMostCorrection + (power - 1.0 - f) * kLogSteps;
      of[i] = static_cast<uint8_t>((static_cast<int>(2.0 * correction) + 1) / 2);
    }
  }
};
constexpr PowerTable kPowerTable;

// Bytes of the table by the lower byte of each word. AVX-512 VBMI, which every processor with AMX
// has.
inline __attribute__((always_inline)) __m512i look_up(__m512i words, __m512i table) {
  constexpr __mmask64 kLower = 0x5555555555555555;
  __m512i found;
  asm("vpermb %2, %1, %0 %{%3%}%{z%}" : "=v"(found) : "v"(words), "v"(table), "Yk"(kLower));
  return found;
}

// Scores of 32 keys as words: 256 (score - maximum) + kWordOfOne - kMostCorrection; 0 is the least.
struct WordScale {
  __m512 scale = _mm512_set1_ps(static_cast<float>(kLogSteps));
  __m512 offset;

  explicit WordScale(float maximum)
      : offset(_mm512_fnmadd_ps(_mm512_set1_ps(maximum), scale,
                                _mm512_set1_ps(kFloatOfWords + kWordOfOne - kMostCorrection))) {}

  __m512i whole(__m512 scores) const {
    return _mm512_sub_epi32(_mm512_castps_si512(_mm512_fmadd_ps(scores, scale, offset)),
                            _mm512_set1_epi32(kBitsOfWords));
  }
  __m512i words(__m512 lower, __m512 upper) const {
    const __m512i packed = _mm512_packus_epi32(whole(lower), whole(upper));
    return _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), packed);
  }
};

// Whether a word of a key that is seen stands for more than 2^kMaxGrowth, or its score was so far
// below the maximum that it wrapped around.
inline bool exceeds(__m512i words, __m512i further, uint64_t seen) {
  constexpr int kMost = kWordOfOne - kMostCorrection + static_cast<int>(kMaxGrowth) * kLogSteps;
  const __m512i most = _mm512_set1_epi16(static_cast<int16_t>(kMost));
  return (_mm512_mask_cmpgt_epu16_mask(static_cast<__mmask32>(seen), words, most) |
          _mm512_mask_cmpgt_epu16_mask(static_cast<__mmask32>(seen >> 32), further, most)) != 0;
}

// A row's maximum moves up to the next whole number above its scores: output and sums are then
// scaled without rounding. Returns it.
inline __attribute__((noinline)) float raise_whole(const AttentionTile& t, int row, uint64_t seen,
                                                   const float* scores) {
  __m512 most = _mm512_set1_ps(t.row_max[row]);
  for (int i = 0; i < kStepKeys; i += kLanes)
    most = _mm512_mask_max_ps(most, static_cast<__mmask16>(seen >> i), most,
                              _mm512_load_ps(scores + i));
  most = _mm512_roundscale_ps(most, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
  if (_mm512_reduce_max_ps(most) > t.row_max[row])
    raise_maximum(t, row, most);
  return t.row_max[row];
}

// Turns a row's scores of kStepKeys keys into probabilities, which are 0 where it does not see the
// key: bit i of `seen` for key i. Its maximum moves only when a score exceeds it by kMaxGrowth.
template <bool kSeesAll>
inline __attribute__((always_inline)) void take_words(const AttentionTile& t, int row,
                                                      uint64_t seen, const float* scores,
                                                      Bf16* probabilities) {
  const WordScale scale(t.row_max[row]);
  __m512 s[kTileVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kTileVectors; ++v)
    s[v] = _mm512_load_ps(scores + v * kLanes);
  __m512i lower = scale.words(s[0], s[1]);
  __m512i upper = scale.words(s[2], s[3]);
  if (exceeds(lower, upper, kSeesAll ? ~uint64_t{0} : seen)) [[unlikely]] {
    const float maximum = raise_whole(t, row, seen, scores);
    const WordScale raised(maximum);
    const __m512 least = _mm512_set1_ps(maximum + kLeastLog);
    for (__m512& x : s)
      x = _mm512_max_ps(x, least);
    lower = raised.words(s[0], s[1]);
    upper = raised.words(s[2], s[3]);
  }
  const __m512i table = _mm512_load_si512(&kPowerTable);
  const auto probability = [&](__m512i words, uint64_t of) {
    const __m512i power = _mm512_avg_epu16(words, look_up(_mm512_srli_epi16(words, 2), table));
    return kSeesAll ? power : _mm512_maskz_mov_epi16(static_cast<__mmask32>(of), power);
  };
  const __m512i p = probability(lower, seen);
  const __m512i q = probability(upper, seen >> 32);
  _mm512_store_si512(probabilities, p);
  _mm512_store_si512(probabilities + 2 * kLanes, q);
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  float* const sums = t.row_sum + row * kLanes;
  const __m512 sum = _mm512_dpbf16_ps(_mm512_loadu_ps(sums), reinterpret_cast<__m512bh>(p), ones);
  _mm512_storeu_ps(sums, _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(q), ones));
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
#endif
