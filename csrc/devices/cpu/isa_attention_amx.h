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
      const TileStep step{first, rows, key, (keys + kPair - 1) / kPair};
      if (rows > kSquare)
        attend_step<true>(step);
      else
        attend_step<false>(step);
    }
  }

  // One after the other: done a piece of each in turn, or with the scores of the next step
  // meanwhile, it takes longer (docs/performance.md).
  template <bool kHasLower>
  void attend_step(const TileStep& step) {
    multiply_keys<kHasLower>(step);
    take(step);
    add_values<kHasLower>(step);
  }

  // Rows of a stay in L1 for the steps to come; keys and values leave it to them.
  template <bool kHasLower>
  static inline __attribute__((always_inline)) void add_products(const Bf16* a, int64_t lda,
                                                                 const Bf16* b, int64_t ldb) {
    Tiles::template load<4>(a, lda * 2);
    if constexpr (kHasLower)
      Tiles::template load<5>(a + kSquare * lda, lda * 2);
    Tiles::template stream<6>(b, ldb * 4);
    Tiles::template stream<7>(b + kPair, ldb * 4);
    TileSums<Tiles, kHasLower, true>::add();
  }

  template <bool kHasLower>
  void multiply_keys(const TileStep& step) {
    using Sums = TileSums<Tiles, kHasLower, true>;
    const Bf16* q = t_.q + int64_t{step.first} * t_.dim;
    for (int pair = 0; pair < step.pairs; ++pair) {
      const Bf16* keys = t_.keys + 2 * (step.key + pair * kPair);
      Sums::clear();
      for (int d = 0; d < t_.dim; d += kDepth)
        add_products<kHasLower>(q + d, t_.dim, keys + int64_t{d} * t_.tokens, t_.tokens);
      Sums::store(scores_[0] + pair * kPair, sizeof scores_[0]);
    }
  }

  template <bool kHasLower>
  void add_values(const TileStep& step) {
    using Sums = TileSums<Tiles, kHasLower, true>;
    const int64_t dim = t_.dim;
    float* output = t_.output + step.first * dim;
    for (int column = 0; column < t_.dim; column += kPair, output += kPair) {
      Sums::load(output, dim * 4);
      for (int pair = 0; pair < step.pairs; ++pair) {
        const Bf16* values = t_.values + (step.key + pair * kPair) * dim + 2 * column;
        add_products<kHasLower>(probabilities_[0] + pair * kPair, kStepKeys, values, dim);
      }
      Sums::store(output, dim * 4);
    }
  }

  void take(const TileStep& step) {
    const bool sees_all = t_.sees_all && step.pairs == kStepKeys / kPair;
    for (int r = 0; r < step.rows; ++r) {
      const int row = step.first + r;
      if (t_.softcap != 0.0f)
        cap(scores_[r], step.pairs * kPair);
      if (sees_all)
        take_words<true>(t_, row, ~uint64_t{0}, scores_[r], probabilities_[r]);
      else
        take_words<false>(t_, row, seen(step, row), scores_[r], probabilities_[r]);
    }
  }
  // Bit i: whether a row sees key i of the step. Scores behind the step's pairs are not its own.
  uint64_t seen(const TileStep& step, int row) const {
    const int keys = step.pairs * kPair;
    const int end = end_seen(t_, row) - step.key;
    return bits_below(end < keys ? end : keys) & ~bits_below(first_seen(t_, row) - step.key);
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
  // Of one step.
  alignas(64) float scores_[kPair][kStepKeys];
  alignas(64) Bf16 probabilities_[kPair][kStepKeys];
};

inline void attend_by_tiles(const AttentionTile& tile) {
  TileAttention<ProcessorTiles>(tile).run();
}

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
#endif
