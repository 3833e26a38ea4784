// The inner step of attention in bf16 for AVX-512 BF16: some query rows against one block of keys
// and values, scores and probabilities kept in registers. Included by row_kernels.isa.cc only.
#pragma once

#include "devices/cpu/isa_math.h"

#ifdef __AVX512BF16__
namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

constexpr int kLanes = 16;  // floats of a vector
static_assert(kLanes == kSumLanes);
constexpr int kTileRows = 6;        // with 4 vectors a row: 24 sums, the rest holds operands
constexpr int kTileVectors = 4;     // 64 keys, or 64 columns of the output
constexpr float kMaxGrowth = 8.0f;  // log2 of what a probability may exceed 1 by

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
// Asks for as many lines as it reads of b.
template <int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply(const Bf16* a, int64_t lda, const Bf16* b,
                                                    int64_t ldb, int pairs, LinesAhead& ahead,
                                                    __m512 (&sums)[kRows][kVectors]) {
  LinesAhead lines = ahead;
  for (int p = 0; p < pairs; ++p) {
    __m512bh right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      right[v] = pairs_of(b + p * ldb + v * 2 * kLanes);
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
  ahead = lines;
}

// Rows [first, first + kRows) of a tile, against keys [key, key + 16 * kVectors) of its block.
template <int kRows, int kVectors>
class AttentionStep {
 public:
  AttentionStep(const AttentionTile& tile, int first, int key, LinesAhead& ahead)
      : t_(tile), first_(first), key_(key), ahead_(ahead) {}

  void run() {
    __m512 scores[kRows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        scores[r][v] = _mm512_setzero_ps();
    }
    multiply<kRows, kVectors>(t_.q + int64_t{first_} * t_.dim, t_.dim, t_.keys + 2 * key_,
                              2 * t_.tokens, t_.dim / 2, ahead_, scores);
    if (t_.softcap != 0.0f)
      cap(scores);
    int last = 0;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
      last = take_row(r, scores[r], last);
    for (int column = 0; column < t_.dim; column += kTileVectors * kLanes)
      add_values(column, last);
  }

 private:
  void cap(__m512 (&scores)[kRows][kVectors]) const {
    const __m512 cap = _mm512_set1_ps(t_.softcap);
    const __m512 inverse = _mm512_set1_ps(1.0f / t_.softcap);
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v)
        scores[r][v] = _mm512_mul_ps(tanh_of(_mm512_mul_ps(scores[r][v], inverse)), cap);
    }
  }

  // Turns a row's scores into probabilities. A row's maximum moves only when a score exceeds it by
  // kMaxGrowth: until then nothing has to be scaled. Returns the end of the keys that any row sees.
  inline __attribute__((always_inline)) int take_row(int r, const __m512 (&scores)[kVectors],
                                                     int last) {
    const int row = first_ + r;
    const int lo = t_.valid_lo[row] - key_;
    const int hi = t_.valid_hi[row] - key_;
    __mmask16 seen[kVectors];
    __m512 most = _mm512_set1_ps(kNoMaximum);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      seen[v] = static_cast<__mmask16>(mask_below(hi - v * kLanes) & ~mask_below(lo - v * kLanes));
      most = _mm512_mask_max_ps(most, seen[v], most, scores[v]);
    }
    keep_[r] = 1.0f;
    const float before = t_.row_max[row];
    if (_mm512_cmp_ps_mask(most, _mm512_set1_ps(before + kMaxGrowth), _CMP_GT_OQ) != 0) {
      const float peak = _mm512_reduce_max_ps(most);
      keep_[r] = before == kNoMaximum ? 0.0f : exp2_clamped(before - peak);
      t_.row_max[row] = peak;
    }
    const __m512 peak = _mm512_set1_ps(t_.row_max[row]);
    __m512 sum =
        _mm512_mul_ps(_mm512_loadu_ps(t_.row_sum + row * kLanes), _mm512_set1_ps(keep_[r]));
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __m512 e = _mm512_maskz_mov_ps(seen[v], short_exp2_of(_mm512_sub_ps(scores[v], peak)));
      sum = _mm512_add_ps(sum, e);
      _mm256_store_si256(reinterpret_cast<__m256i*>(probabilities_[r] + v * kLanes),
                         reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(e)));
    }
    _mm512_storeu_ps(t_.row_sum + row * kLanes, sum);
    return hi > last ? hi : last;
  }

  static uint32_t mask_below(int n) {
    return n >= kLanes ? 0xffffu : (n <= 0 ? 0u : (1u << n) - 1u);
  }

  void add_values(int column, int last) {
    switch ((t_.dim - column) / kLanes) {
      case 1:
        return add_columns<1>(column, last);
      case 2:
        return add_columns<2>(column, last);
      case 3:
        return add_columns<3>(column, last);
      default:
        return add_columns<kTileVectors>(column, last);
    }
  }

  // output = output * keep + probabilities * values, for 16 * kColumns columns.
  template <int kColumns>
  void add_columns(int column, int last) {
    float* output = t_.output + int64_t{first_} * t_.dim + column;
    __m512 sums[kRows][kColumns];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512 keep = _mm512_set1_ps(keep_[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v)
        sums[r][v] = _mm512_mul_ps(_mm512_loadu_ps(output + r * t_.dim + v * kLanes), keep);
    }
    const int end = last < kVectors * kLanes ? last : kVectors * kLanes;
    multiply<kRows, kColumns>(probabilities_[0], kTileVectors * kLanes,
                              t_.values + int64_t{key_} * t_.dim + 2 * column, 2 * t_.dim,
                              (end + 1) / 2, ahead_, sums);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kColumns; ++v)
        _mm512_storeu_ps(output + r * t_.dim + v * kLanes, sums[r][v]);
    }
  }

  const AttentionTile& t_;
  const int first_;
  const int key_;
  LinesAhead& ahead_;
  float keep_[kRows];
  alignas(64) Bf16 probabilities_[kRows][kTileVectors * kLanes];
};

template <int kRows>
void attend_rows(const AttentionTile& tile, int first) {
  int begin = tile.tokens;
  int end = 0;
  for (int r = first; r < first + kRows; ++r) {
    begin = tile.valid_lo[r] < begin ? tile.valid_lo[r] : begin;
    end = tile.valid_hi[r] > end ? tile.valid_hi[r] : end;
  }
  constexpr int kStep = kTileVectors * kLanes;
  // Steps lie where they lie for any rows: a row's bits must not depend on its neighbours.
  begin = begin < 0 ? 0 : begin / kStep * kStep;
  end = end > tile.tokens ? tile.tokens : end;
  // The first rows of a block ask for the next one.
  LinesAhead ahead{reinterpret_cast<const char*>(tile.q), 0};
  if (first == 0 && tile.ahead != nullptr)
    ahead = {reinterpret_cast<const char*>(tile.ahead), 64};
  for (int key = begin; key < end; key += kStep) {
    switch ((end - key + kLanes - 1) / kLanes) {
      case 1:
        AttentionStep<kRows, 1>(tile, first, key, ahead).run();
        break;
      case 2:
        AttentionStep<kRows, 2>(tile, first, key, ahead).run();
        break;
      case 3:
        AttentionStep<kRows, 3>(tile, first, key, ahead).run();
        break;
      default:
        AttentionStep<kRows, kTileVectors>(tile, first, key, ahead).run();
    }
  }
}

void attend(const AttentionTile& tile) {
  int row = 0;
  for (; row + kTileRows <= tile.rows; row += kTileRows)
    attend_rows<kTileRows>(tile, row);
  switch (tile.rows - row) {
    case 5:
      return attend_rows<5>(tile, row);
    case 4:
      return attend_rows<4>(tile, row);
    case 3:
      return attend_rows<3>(tile, row);
    case 2:
      return attend_rows<2>(tile, row);
    case 1:
      return attend_rows<1>(tile, row);
    default:
      return;
  }
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
#endif
