// The inner step of attention in bf16 for AVX-512 BF16: some query rows against one block of keys
// and values. Included by row_kernels.isa.cc only.
#pragma once

#include "devices/cpu/isa_attention_pieces.h"
#include "devices/cpu/isa_attention_pipeline.h"

#ifdef __AVX512BF16__
namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

// Rows [first, first + kRows) of a tile, against those of keys [key, key + 16 * kVectors) of its
// block that each row sees.
template <int kRows, int kVectors>
class AttentionStep {
 public:
  AttentionStep(const AttentionTile& tile, int first, int key, LinesAhead& ahead)
      : t_(tile), first_(first), key_(key), ahead_(ahead) {}

  void run() {
    __m512 scores[kRows][kVectors];
    clear(scores);
    multiply(t_.q + int64_t{first_} * t_.dim, t_.dim, t_.keys + 2 * key_, 2 * int64_t{t_.tokens},
             t_.dim / 2, &ahead_, scores);
    if (t_.softcap != 0.0f)
      cap(scores);
    store(scores, s_.scores[0], kStepKeys);
    int last = 0;
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
      last = take(r, last);
    const int end = last < kVectors * kLanes ? last : kVectors * kLanes;
    add_values<kRows>(t_, first_, key_, (end + 1) / 2, s_, &ahead_);
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

  // Returns the end of the keys that any row sees.
  inline __attribute__((always_inline)) int take(int r, int last) {
    const int lo = first_seen(t_, first_ + r) - key_;
    const int hi = end_seen(t_, first_ + r) - key_;
    __mmask16 seen[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      seen[v] = static_cast<__mmask16>(mask_below(hi - v * kLanes) & ~mask_below(lo - v * kLanes));
    take_row<kVectors>(t_, first_ + r, seen, s_.scores[r], s_.probabilities[r]);
    return hi > last ? hi : last;
  }

  const AttentionTile& t_;
  const int first_;
  const int key_;
  LinesAhead& ahead_;
  StepScratch s_;
};

template <int kRows>
void attend_rows(const AttentionTile& tile, int first) {
  int begin = tile.tokens;
  int end = 0;
  for (int r = first; r < first + kRows; ++r) {
    const int lo = first_seen(tile, r);
    const int hi = end_seen(tile, r);
    begin = lo < begin ? lo : begin;
    end = hi > end ? hi : end;
  }
  // Steps lie where they lie for any rows: a row's bits must not depend on its neighbours.
  begin = begin < 0 ? 0 : begin / kStepKeys * kStepKeys;
  end = end > tile.tokens ? tile.tokens : end;
  // The first rows of a block ask for the next one.
  LinesAhead ahead{reinterpret_cast<const char*>(tile.q), 0};
  if (first == 0 && tile.ahead != nullptr)
    ahead = {reinterpret_cast<const char*>(tile.ahead), 64};
  for (int key = begin; key < end; key += kStepKeys) {
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

// Whole tiles of rows that see all keys; returns how many rows these are.
int attend_pipelined(const AttentionTile& tile) {
  const int rows = tile.rows / kTileRows * kTileRows;
  if (!tile.sees_all || rows == 0 || tile.tokens % kStepKeys != 0 || tile.softcap != 0.0f)
    return 0;
  AttentionPipeline pipeline(tile);
  for (int row = 0; row < rows; row += kTileRows) {
    for (int key = 0; key < tile.tokens; key += kStepKeys)
      pipeline.step(row, key);
  }
  pipeline.finish();
  return rows;
}

void attend(const AttentionTile& tile) {
  int row = attend_pipelined(tile);
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
