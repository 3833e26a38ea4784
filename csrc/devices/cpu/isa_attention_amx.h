// The inner step of attention in bf16 on AMX tiles: some query rows against one block of keys and
// values, by whatever computes like tiles: row_kernels.isa.cc gives it the processor's, a test
// plain loops. Included by these two only. It asks for no block ahead: on a Xeon that saved
// nothing.
#pragma once

#include "devices/cpu/isa_attention_words.h"
#include "devices/cpu/isa_tiles.h"

#if defined(__AVX512BF16__) && defined(__x86_64__)
namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

constexpr int kDepth = 32;  // of one instruction

// Up to 32 rows against up to kStepKeys keys.
struct TileStep {
  int first;
  int rows;
  int key;
  int pairs;  // 32 keys each
};

template <typename Tiles>
class TileAttention {
 public:
  explicit TileAttention(const AttentionTile& tile) : t_(tile) {}

  void run() {
    Tiles::begin(kPair);
    for (int row = 0; row < t_.rows; row += kPair)
      attend_rows(row, t_.rows - row < kPair ? t_.rows - row : kPair);
    finish();
    Tiles::end();
  }

 private:
  // Steps lie where they lie for any rows: a row's bits must not depend on its neighbours.
  void attend_rows(int first, int rows) {
    int begin = t_.tokens;
    int end = 0;
    for (int r = first; r < first + rows; ++r) {
      const int lo = first_seen(t_, r);
      const int hi = end_seen(t_, r);
      begin = lo < begin ? lo : begin;
      end = hi > end ? hi : end;
    }
    begin = begin < 0 ? 0 : begin / kStepKeys * kStepKeys;
    end = end > t_.tokens ? t_.tokens : end;
    for (int key = begin; key < end; key += kStepKeys) {
      const int keys = end - key < kStepKeys ? end - key : kStepKeys;
      add({first, rows, key, (keys + kPair - 1) / kPair});
    }
  }

  // A step's scores are multiplied while those of the step before become probabilities; values come
  // last.
  void add(const TileStep& step) {
    const int next = 1 - current_;
    if (has_values_)
      add_values(of_values_, next);
    has_values_ = has_scores_;
    if (has_scores_) {
      const int half = of_scores_.rows < kSquare ? of_scores_.rows : kSquare;
      take(of_scores_, current_, 0, half);
      multiply_keys(step, next);
      take(of_scores_, current_, half, of_scores_.rows);
      of_values_ = of_scores_;
    } else {
      multiply_keys(step, next);
    }
    has_scores_ = true;
    of_scores_ = step;
    current_ = next;
  }

  void finish() {
    if (has_values_)
      add_values(of_values_, 1 - current_);
    if (!has_scores_)
      return;
    take(of_scores_, current_, 0, of_scores_.rows);
    add_values(of_scores_, current_);
  }

  // 32 by 32 sums, or 16 by 32 if there are no lower rows.
  template <bool kHasLower>
  static inline __attribute__((always_inline)) void add_products(const Bf16* a, int64_t lda,
                                                                 const Bf16* b, int64_t ldb) {
    Tiles::template load<4>(a, lda * 2);
    if constexpr (kHasLower)
      Tiles::template load<5>(a + kSquare * lda, lda * 2);
    Tiles::template load<6>(b, ldb * 4);
    Tiles::template load<7>(b + kPair, ldb * 4);
    Tiles::template multiply<0, 4, 6>();
    if constexpr (kHasLower)
      Tiles::template multiply<2, 5, 6>();
    Tiles::template multiply<1, 4, 7>();
    if constexpr (kHasLower)
      Tiles::template multiply<3, 5, 7>();
  }
  template <bool kHasLower>
  static inline __attribute__((always_inline)) void store_sums(float* to, int64_t ld) {
    Tiles::template store<0>(to, ld * 4);
    Tiles::template store<1>(to + kSquare, ld * 4);
    if constexpr (kHasLower) {
      Tiles::template store<2>(to + kSquare * ld, ld * 4);
      Tiles::template store<3>(to + kSquare * ld + kSquare, ld * 4);
    }
  }

  void multiply_keys(const TileStep& step, int buffer) {
    if (step.rows > kSquare)
      multiply_keys<true>(step, scores_[buffer][0]);
    else
      multiply_keys<false>(step, scores_[buffer][0]);
  }
  template <bool kHasLower>
  void multiply_keys(const TileStep& step, float* to) {
    const Bf16* q = t_.q + int64_t{step.first} * t_.dim;
    for (int pair = 0; pair < step.pairs; ++pair) {
      const Bf16* keys = t_.keys + 2 * (step.key + pair * kPair);
      Tiles::template zero<0>();
      Tiles::template zero<1>();
      if constexpr (kHasLower) {
        Tiles::template zero<2>();
        Tiles::template zero<3>();
      }
      for (int d = 0; d < t_.dim; d += kDepth)
        add_products<kHasLower>(q + d, t_.dim, keys + int64_t{d} * t_.tokens, t_.tokens);
      store_sums<kHasLower>(to + pair * kPair, kStepKeys);
    }
  }

  void add_values(const TileStep& step, int buffer) {
    if (step.rows > kSquare)
      add_values<true>(step, probabilities_[buffer][0]);
    else
      add_values<false>(step, probabilities_[buffer][0]);
  }
  template <bool kHasLower>
  void add_values(const TileStep& step, const Bf16* probabilities) {
    const int64_t dim = t_.dim;
    float* output = t_.output + step.first * dim;
    for (int column = 0; column < t_.dim; column += kPair, output += kPair) {
      Tiles::template load<0>(output, dim * 4);
      Tiles::template load<1>(output + kSquare, dim * 4);
      if constexpr (kHasLower) {
        Tiles::template load<2>(output + kSquare * dim, dim * 4);
        Tiles::template load<3>(output + kSquare * dim + kSquare, dim * 4);
      }
      for (int pair = 0; pair < step.pairs; ++pair) {
        const Bf16* values = t_.values + (step.key + pair * kPair) * dim + 2 * column;
        add_products<kHasLower>(probabilities + pair * kPair, kStepKeys, values, dim);
      }
      store_sums<kHasLower>(output, dim);
    }
  }

  void take(const TileStep& step, int buffer, int begin, int end) {
    for (int r = begin; r < end; ++r) {
      if (t_.softcap != 0.0f)
        cap(scores_[buffer][r], step.pairs * kPair);
      if (t_.sees_all && step.pairs == kStepKeys / kPair)
        take_words<true>(t_, step.first + r, ~uint64_t{0}, scores_[buffer][r],
                         probabilities_[buffer][r]);
      else
        take_words<false>(t_, step.first + r, seen(step, r), scores_[buffer][r],
                          probabilities_[buffer][r]);
    }
  }
  // Bit i: whether a row sees key i of the step. Scores behind the step's pairs are not its own.
  uint64_t seen(const TileStep& step, int r) const {
    const int keys = step.pairs * kPair;
    const int end = end_seen(t_, step.first + r) - step.key;
    return bits_below(end < keys ? end : keys) &
           ~bits_below(first_seen(t_, step.first + r) - step.key);
  }
  static uint64_t bits_below(int n) {
    return n >= kStepKeys ? ~uint64_t{0} : (n <= 0 ? 0 : (uint64_t{1} << n) - 1);
  }
  void cap(float* scores, int keys) const {
    const __m512 cap = _mm512_set1_ps(t_.softcap);
    const __m512 inverse = _mm512_set1_ps(1.0f / t_.softcap);
    for (int i = 0; i < keys; i += kLanes) {
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(scores + i), inverse);
      _mm512_store_ps(scores + i, _mm512_mul_ps(tanh_of(x), cap));
    }
  }

  const AttentionTile& t_;
  bool has_scores_ = false;
  bool has_values_ = false;
  TileStep of_scores_{};  // whose scores are there, in the current buffer, and no more
  TileStep of_values_{};  // whose probabilities are there, in the other one
  int current_ = 0;
  alignas(64) float scores_[2][kPair][kStepKeys];
  alignas(64) Bf16 probabilities_[2][kPair][kStepKeys];
};

inline void attend_by_tiles(const AttentionTile& tile) {
  TileAttention<ProcessorTiles>(tile).run();
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
#endif
