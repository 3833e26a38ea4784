// Attention over blocks that all rows see, as most blocks of a long prompt are, in bf16 with
// AVX-512 BF16. Included by isa_attention.h only.
#pragma once

#include "devices/cpu/isa_attention_pieces.h"

#ifdef __AVX512BF16__
namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

// Steps of kTileRows rows and kStepKeys keys, in order. A step's scores become probabilities while
// those of the next step are multiplied: all that takes is vector units which products leave idle,
// and the 8 registers that their sums leave.
class AttentionPipeline {
 public:
  explicit AttentionPipeline(const AttentionTile& tile)
      : t_(tile), ahead_{reinterpret_cast<const char*>(tile.ahead), kLineBytes} {
    const int64_t rows = tile.rows / kTileRows * kTileRows;
    const int64_t times = rows * (tile.tokens / kStepKeys);
    const int64_t bytes = 2 * int64_t{tile.dim} * tile.tokens * int64_t{sizeof(Bf16)};
    const int64_t lines = tile.ahead == nullptr ? 0 : bytes / kLineBytes;
    lines_ = static_cast<int>((lines + times - 1) / times);
    end_ = ahead_.at + lines * kLineBytes;
  }

  // Rows [first, first + kTileRows), keys [key, key + kStepKeys).
  void step(int first, int key) {
    if (is_pending_) {
      multiply_keys<true>(first, key);
      add_values<kTileRows>(t_, first_, key_, kStepKeys / 2, s_, nullptr);
    } else {
      multiply_keys<false>(first, key);
    }
    first_ = first;
    key_ = key;
    is_pending_ = true;
  }

  // The last step has no next one to hide behind.
  void finish() {
    for (int r = 0; r < kTileRows; ++r)
      take(r);
    add_values<kTileRows>(t_, first_, key_, kStepKeys / 2, s_, nullptr);
  }

 private:
  static constexpr int64_t kLineBytes = 64;

  template <bool kIsPending>
  inline __attribute__((always_inline)) void multiply_keys(int first, int key) {
    __m512 sums[kTileRows][kTileVectors];
    clear(sums);
    const Bf16* q = t_.q + int64_t{first} * t_.dim;
    const Bf16* keys = t_.keys + 2 * key;
    const int64_t ld = 2 * int64_t{t_.tokens};
    int begin = 0;
#pragma GCC unroll 1
    for (int r = 0; r < kTileRows; ++r) {
      if constexpr (kIsPending)
        take(r);
      ask_ahead();
      const int end = t_.dim / 2 * (r + 1) / kTileRows;
      multiply(q + 2 * begin, t_.dim, keys + begin * ld, ld, end - begin, nullptr, sums);
      begin = end;
    }
    store(sums, s_.scores[0], kStepKeys);
  }

  inline __attribute__((always_inline)) void take(int r) {
    constexpr __mmask16 kSeen[kTileVectors] = {0xffff, 0xffff, 0xffff, 0xffff};
    take_row<kTileVectors>(t_, first_ + r, kSeen, s_.scores[r], s_.probabilities[r]);
  }

  inline __attribute__((always_inline)) void ask_ahead() {
    for (int i = 0; i < lines_ && ahead_.at < end_; ++i)
      ahead_.ask();
  }

  const AttentionTile& t_;
  LinesAhead ahead_;  // of the next block
  const char* end_;
  int lines_;                // to ask for with each row
  bool is_pending_ = false;  // a step whose scores are there, and no more
  int first_ = 0;
  int key_ = 0;
  StepScratch s_;
};

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
#endif
