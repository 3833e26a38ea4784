// What attention in bf16 is made of with AVX-512 BF16: the product of some rows and a panel, scores
// that become probabilities, values that are added up. Included by isa_attention*.h and
// isa_product_bf16.h only.
#pragma once

#include "devices/cpu/isa_math.h"

#ifdef __AVX512BF16__
namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

constexpr int kLanes = 16;  // floats of a vector
static_assert(kLanes == kSumLanes);
constexpr int kTileRows = 6;     // with 4 vectors a row: 24 sums, the rest holds operands
constexpr int kTileVectors = 4;  // 64 keys, or 64 columns of the output
constexpr int kStepKeys = kTileVectors * kLanes;  // whose scores are worked out at once
constexpr float kMaxGrowth = 8.0f;                // log2 of what a probability may exceed 1 by

// 2^f on [-0.5, 0.5], minimax in relative error: 7.5e-5 (own fit); bf16 rounds by 2e-3.
constexpr float kExp2Short[4] = {9.999280729e-1f, 6.932609864e-1f, 2.426111328e-1f,
                                 5.517166878e-2f};

inline __m512 short_exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(kExp2Short[3]);
#pragma GCC unroll 3
  for (int i = 2; i >= 0; --i)
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2Short[i]));
  return _mm512_scalef_ps(p, whole);
}

// Two neighbours of a row, in every lane.
inline __m512bh pair_of(const Bf16* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}
inline __m512bh pairs_of(const Bf16* pairs) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(pairs));
}

// Tokens [first_seen, end_seen) of a block are those that a row sees; either may lie outside of it.
inline int first_seen(const AttentionTile& tile, int row) {
  return tile.sees_all ? 0 : tile.valid_lo[row];
}
inline int end_seen(const AttentionTile& tile, int row) {
  return tile.sees_all ? tile.tokens : tile.valid_hi[row];
}

inline uint32_t mask_below(int n) {
  return n >= kLanes ? 0xffffu : (n <= 0 ? 0u : (1u << n) - 1u);
}

// Asks for cache lines one after another, or (step 0) again and again for one that is there: all
// at once they would hold up what is computed meanwhile.
struct LinesAhead {
  const char* at;
  int64_t step;

  inline __attribute__((always_inline)) void ask() {
    _mm_prefetch(at, _MM_HINT_T1);
    at += step;
  }
};

// sums[r][v] += a[r] * b over so many pairs; a's rows lie lda apart, b's pairs ldb, both in bf16.
// Asks for as many lines as it reads of b, if there are lines to ask for.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply(const Bf16* a, int64_t lda, const Bf16* b,
                                                    int64_t ldb, int pairs, LinesAhead* ahead,
                                                    __m512 (&sums)[kRows][kVectors]) {
  LinesAhead lines = ahead == nullptr ? LinesAhead{} : *ahead;
  for (int p = 0; p < pairs; ++p) {
    __m512bh right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      right[v] = pairs_of(b + p * ldb + v * 2 * kLanes);
      if (ahead != nullptr)
        lines.ask();
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512bh left = pair_of(a + r * lda + 2 * p);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
    }
  }
  if (ahead != nullptr)
    *ahead = lines;
}

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void clear(__m512 (&sums)[kRows][kVectors]) {
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = _mm512_setzero_ps();
  }
}

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void load(const float* from, int64_t ld,
                                                __m512 (&sums)[kRows][kVectors]) {
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      sums[r][v] = _mm512_loadu_ps(from + r * ld + v * kLanes);
  }
}

template <int kRows, int kVectors>
inline __attribute__((always_inline)) void store(const __m512 (&sums)[kRows][kVectors], float* to,
                                                 int64_t ld) {
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      _mm512_storeu_ps(to + r * ld + v * kLanes, sums[r][v]);
  }
}

// Some rows against kStepKeys keys.
struct StepScratch {
  alignas(64) float scores[kTileRows][kStepKeys];
  alignas(64) Bf16 probabilities[kTileRows][kStepKeys];
};

// A row's maximum moves up to that of these scores; its sums and output are scaled.
inline __attribute__((always_inline)) void raise_maximum(const AttentionTile& t, int row,
                                                         __m512 scores) {
  const float before = t.row_max[row];
  const float peak = _mm512_reduce_max_ps(scores);
  t.row_max[row] = peak;
  if (before == kNoMaximum)  // both are 0
    return;
  const __m512 keep = _mm512_set1_ps(exp2_clamped(before - peak));
  float* sum = t.row_sum + row * kLanes;
  _mm512_storeu_ps(sum, _mm512_mul_ps(_mm512_loadu_ps(sum), keep));
  float* output = t.output + int64_t{row} * t.dim;
#pragma GCC unroll 1
  for (int i = 0; i < t.dim; i += kLanes)
    _mm512_storeu_ps(output + i, _mm512_mul_ps(_mm512_loadu_ps(output + i), keep));
}

// Turns a row's scores of kVectors vectors into probabilities, which are 0 where it does not see
// the key. Its maximum moves only when a score exceeds it by kMaxGrowth: until then nothing has to
// be scaled. Scores are read twice: what calls this has no registers left.
template <int kVectors>
inline __attribute__((always_inline)) void take_row(const AttentionTile& t, int row,
                                                    const __mmask16 (&seen)[kVectors],
                                                    const float* scores, Bf16* probabilities) {
  __m512 most = _mm512_set1_ps(kNoMaximum);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v)
    most = _mm512_mask_max_ps(most, seen[v], most, _mm512_load_ps(scores + v * kLanes));
  if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(t.row_max[row] + kMaxGrowth), _CMP_GT_OQ) != 0)
    raise_maximum(t, row, most);
  const __m512 peak = _mm512_set1_ps(t.row_max[row]);
  __m512 sum = _mm512_loadu_ps(t.row_sum + row * kLanes);
  const auto probability = [&](int v) {
    if (v >= kVectors)
      return _mm512_setzero_ps();
    const __m512 p = short_exp2_of(_mm512_sub_ps(_mm512_load_ps(scores + v * kLanes), peak));
    const __m512 e = _mm512_maskz_mov_ps(seen[v], p);
    // As it stands: a compiler that may change the order of a plain sum would do so here, but not
    // where there are other vectors, and a row's bits would depend on its neighbours.
    sum = _mm512_add_round_ps(sum, e, _MM_FROUND_CUR_DIRECTION);
    return e;
  };
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; v += 2) {
    const __m512 low = probability(v);
    _mm512_store_si512(probabilities + v * kLanes,
                       reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(probability(v + 1), low)));
  }
  _mm512_storeu_ps(t.row_sum + row * kLanes, sum);
}

// output += probabilities * values of so many pairs of keys from `key` on, for 16 * kColumns
// columns.
template <int kRows, int kColumns>
inline __attribute__((always_inline)) void add_columns(const AttentionTile& t, int first, int key,
                                                       int pairs, int column, const Bf16* p,
                                                       LinesAhead* ahead) {
  float* output = t.output + int64_t{first} * t.dim + column;
  const int64_t ld = t.dim;
  __m512 sums[kRows][kColumns];
  load(output, ld, sums);
  multiply(p, kStepKeys, t.values + key * ld + 2 * column, 2 * ld, pairs, ahead, sums);
  store(sums, output, ld);
}

template <int kRows>
inline __attribute__((always_inline)) void add_values(const AttentionTile& t, int first, int key,
                                                      int pairs, const StepScratch& scratch,
                                                      LinesAhead* ahead) {
  const Bf16* p = scratch.probabilities[0];
  int column = 0;
  for (; column + kTileVectors * kLanes <= t.dim; column += kTileVectors * kLanes)
    add_columns<kRows, kTileVectors>(t, first, key, pairs, column, p, ahead);
  switch ((t.dim - column) / kLanes) {
    case 1:
      return add_columns<kRows, 1>(t, first, key, pairs, column, p, ahead);
    case 2:
      return add_columns<kRows, 2>(t, first, key, pairs, column, p, ahead);
    case 3:
      return add_columns<kRows, 3>(t, first, key, pairs, column, p, ahead);
    default:
      return;
  }
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
#endif
