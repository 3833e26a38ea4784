// Attender: the attention of one item, span by span, tile by tile or in one pass. Used by
// attention.cc, which shares the items out.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "devices/cpu/attention.h"
#include "devices/cpu/buffer.h"
#include "devices/cpu/gemm.h"
#include "devices/cpu/row_kernels.h"

namespace flowprefill {

// Keys per softmax tile: scores and probabilities stay in the L2 cache.
inline constexpr int32_t kTileKeys = 256;
inline constexpr size_t kLineFloats = 16;  // of a cache line

template <typename T>
struct Scratch {
  std::vector<T> q;
  std::vector<float> scores;
  std::vector<T> probabilities;
  std::vector<float> softmax;  // over the spans so far, and over one more
  std::vector<int> valid_lo;
  std::vector<int> valid_hi;
};

using AttendBlock = void (*)(const AttentionTile&);

// What attends a block in one pass, its scores in registers or on AMX tiles; null: nothing here.
inline AttendBlock attend_block(const RowKernels<Bf16>& kernels, int32_t dim,
                                int32_t block_tokens) {
  if (has_amx())
    return dim % 32 == 0 && block_tokens % 32 == 0 ? kernels.attend_by_tiles : nullptr;
  return dim % 16 == 0 && block_tokens % 16 == 0 ? kernels.attend : nullptr;
}
inline AttendBlock attend_block(const RowKernels<float>&, int32_t, int32_t) {
  return nullptr;
}

// The products of one item; rows are ordered [head][row].
template <typename T>
class Attender {
 public:
  Attender(const AttentionArgs<T>& args, const AttentionItem& item)
      : args_(args),
        item_(item),
        s_(scratch()),
        dim_(args.cache->layout().head_dim),
        block_tokens_(args.cache->layout().block_tokens),
        span_(std::max(kSpanKeys / block_tokens_, 1) * block_tokens_),
        group_(args.num_heads / args.cache->layout().kv_heads),
        live_(item.rows * group_),
        last_(item.position + item.rows - 1),
        attend_block_(attend_block(row_kernels<T>(), dim_, block_tokens_)),
        // Room for whole tiles of 16 rows; those beyond live_ are not read.
        rows_((is_fused() ? !has_amx() : live_ <= 4) ? live_ : (live_ + 15) / 16 * 16) {
    first_ = args.window > 0 ? std::max(0, item.position - args.window + 1) : 0;
    first_ -= first_ % block_tokens_;
    end_ = (last_ / block_tokens_ + 1) * block_tokens_;
  }

  int32_t num_spans() const { return (end_ - 1) / span_ - first_ / span_ + 1; }
  // Rows times keys.
  int64_t work() const { return int64_t{item_.rows} * (end_ - first_); }
  // Of the softmax over one span.
  size_t num_floats() const {
    const auto floats = static_cast<size_t>(rows_) * static_cast<size_t>(1 + num_sums() + dim_);
    return (floats + kLineFloats - 1) / kLineFloats * kLineFloats;
  }

  // All spans, one after another.
  void run() {
    float* const floats = line_of(s_.softmax, 2 * num_floats());
    const PartialSoftmax all = softmax_in(floats);
    const PartialSoftmax further = softmax_in(floats + num_floats());
    gather_q();
    attend_span(0, all);
    for (int32_t span = 1; span < num_spans(); ++span) {
      attend_span(span, further);
      row_kernels<T>().merge(further, live_, all);
    }
    write(all);
  }

  // One span, into num_floats().
  void run_span(int32_t span, float* softmax) {
    gather_q();
    attend_span(span, softmax_in(softmax));
  }

  // What run_span() has made of each span, one behind the other.
  void merge_spans(float* softmaxes) {
    const PartialSoftmax all = softmax_in(softmaxes);
    for (int32_t span = 1; span < num_spans(); ++span) {
      softmaxes += num_floats();
      row_kernels<T>().merge(softmax_in(softmaxes), live_, all);
    }
    write(all);
  }

 private:
  static Scratch<T>& scratch() {
    thread_local Scratch<T> scratch;
    return scratch;
  }

  PartialSoftmax softmax_in(float* floats) const {
    float* const sums = floats + int64_t{rows_} * dim_;
    return {.row_max = sums + int64_t{rows_} * num_sums(),
            .row_sum = sums,
            .output = floats,
            .sums = num_sums(),
            .dim = dim_};
  }
  bool is_fused() const { return attend_block_ != nullptr; }
  int num_sums() const { return is_fused() ? kSumLanes : 1; }

  void attend_span(int32_t span, const PartialSoftmax& to) {
    const int32_t begin = (first_ / span_ + span) * span_;
    const auto [first, end] = std::pair(std::max(begin, first_), std::min(begin + span_, end_));
    std::fill_n(to.row_max, rows_,
                is_fused() ? kNoMaximum : -std::numeric_limits<float>::infinity());
    std::fill_n(to.output, int64_t{rows_} * (num_sums() + dim_), 0.0f);  // and the sums
    if (is_fused())
      attend_blocks(first, end, to);
    else
      attend_tiles(first, end, to);
  }

  // Block by block, in one pass each.
  void attend_blocks(int32_t first, int32_t end, const PartialSoftmax& to) {
    if constexpr (sizeof(T) == sizeof(Bf16)) {
      prefetch(first);
      for (int32_t key = first; key < end; key += block_tokens_) {
        const int32_t next = key + block_tokens_;
        const bool is_next_whole = next < end && next + block_tokens_ <= last_ + 1;
        if (next < end && !is_next_whole)
          prefetch(next);
        const bool sees_all = next <= item_.position + 1 && sees_from(key);
        if (!sees_all)
          mask(key);
        attend_block_({.q = q_,
                       .keys = keys_at(key),
                       .values = values_at(key),
                       .rows = live_,
                       .dim = dim_,
                       .tokens = block_tokens_,
                       .sees_all = sees_all,
                       .valid_lo = s_.valid_lo.data(),
                       .valid_hi = s_.valid_hi.data(),
                       .row_max = to.row_max,
                       .row_sum = to.row_sum,
                       .output = to.output,
                       .softcap = args_.softcap,
                       .ahead = is_next_whole ? keys_at(next) : nullptr});
      }
    }
  }

  // Tile by tile: all scores, then their softmax, then the products with the values.
  void attend_tiles(int32_t first, int32_t end, const PartialSoftmax& to) {
    const int32_t tile = std::max(kTileKeys / block_tokens_, 1) * block_tokens_;
    s_.scores.resize(static_cast<size_t>(rows_) * static_cast<size_t>(tile));
    s_.probabilities.resize(static_cast<size_t>(rows_) * static_cast<size_t>(tile));
    // Tiles lie where they lie for any rows, as spans do.
    for (int32_t key = first; key < end; key = (key / tile + 1) * tile)
      process_tile(key, std::min((key / tile + 1) * tile, end) - key, tile, to);
    brgemm_end<T>();
  }

  const T* keys_at(int32_t key) const {
    return args_.cache->template key<T>(args_.layer, item_.block_table[key / block_tokens_],
                                        item_.kv_head);
  }
  const T* values_at(int32_t key) const {
    return args_.cache->template value<T>(args_.layer, item_.block_table[key / block_tokens_],
                                          item_.kv_head);
  }

  // What the rows see of a block. Blocks lie apart: no hardware foresees the next one.
  void prefetch(int32_t key) const {
    constexpr int64_t kLine = 64;
    const int64_t pair = 2 * sizeof(T);
    const int64_t tokens = std::min(block_tokens_, last_ + 1 - key);
    const auto* keys = reinterpret_cast<const char*>(keys_at(key));
    for (int64_t d = 0; d < dim_ / 2; ++d) {
      for (int64_t i = 0; i < tokens * pair; i += kLine)
        __builtin_prefetch(keys + d * block_tokens_ * pair + i, 0, 2);
    }
    const auto* values = reinterpret_cast<const char*>(values_at(key));
    for (int64_t i = 0; i < (tokens + 1) / 2 * dim_ * pair; i += kLine)
      __builtin_prefetch(values + i, 0, 2);
  }

  const T* q_head(int32_t head_in_group) const {
    const int64_t head = int64_t{item_.kv_head} * group_ + head_in_group;
    return args_.q + int64_t{item_.row} * args_.num_heads * dim_ + head * dim_;
  }

  void gather_q() {
    const size_t elements = static_cast<size_t>(rows_) * static_cast<size_t>(dim_);
    q_ = line_of(s_.q, elements);
    std::fill_n(q_, elements, T{});
    s_.valid_lo.assign(static_cast<size_t>(rows_), 0);
    s_.valid_hi.assign(static_cast<size_t>(rows_), 0);
    for (int32_t h = 0; h < group_; ++h) {
      const T* from = q_head(h);
      T* to = q_ + int64_t{h} * item_.rows * dim_;
      for (int32_t r = 0; r < item_.rows; ++r) {
        std::memcpy(to + int64_t{r} * dim_, from + int64_t{r} * args_.num_heads * dim_,
                    sizeof(T) * static_cast<size_t>(dim_));
      }
    }
  }

  // ld: the same for tiles of any keys, for ATen compiles a product anew for every one, on every
  // thread.
  void process_tile(int32_t key, int32_t keys, int64_t ld, const PartialSoftmax& to) {
    const Block<T> scores{
        .n = block_tokens_, .k = dim_, .lda = dim_, .ldb = block_tokens_, .ldc = ld, .add = false};
    for (int32_t k = 0; k < keys; k += block_tokens_)
      brgemm(scores, rows_, q_, keys_at(key + k), s_.scores.data() + k);
    mask(key);
    row_kernels<T>().softmax({.scores = s_.scores.data(),
                              .ld = ld,
                              .rows = rows_,
                              .cols = keys,
                              .valid_lo = s_.valid_lo.data(),
                              .valid_hi = s_.valid_hi.data(),
                              .row_max = to.row_max,
                              .row_sum = to.row_sum,
                              .output = to.output,
                              .dim = dim_,
                              .softcap = args_.softcap},
                             s_.probabilities.data());
    const Block<T> values{
        .n = dim_, .k = block_tokens_, .lda = ld, .ldb = dim_, .ldc = dim_, .add = true};
    for (int32_t k = 0; k < keys; k += block_tokens_)
      brgemm(values, rows_, s_.probabilities.data() + k, values_at(key + k), to.output);
  }

  // Whether all rows look back as far as this.
  bool sees_from(int32_t key) const { return args_.window <= 0 || last_ - args_.window < key; }

  // Which columns of the tile starting at `key` each row may see.
  void mask(int32_t key) {
    const int32_t back = args_.window > 0 ? args_.window : last_ + 1;
    size_t row = 0;
    for (int32_t h = 0; h < group_; ++h) {
      for (int32_t r = 0; r < item_.rows; ++r, ++row) {
        const int32_t end = item_.position + r + 1 - key;
        s_.valid_hi[row] = end;
        s_.valid_lo[row] = end - back;
      }
    }
  }

  void write(const PartialSoftmax& all) {
    for (int32_t r = 0; is_fused() && r < live_; ++r) {
      const float* lanes = all.row_sum + int64_t{r} * kSumLanes;
      all.row_sum[r] = std::accumulate(lanes, lanes + kSumLanes, 0.0f);
    }
    const int64_t ld = int64_t{args_.num_heads} * dim_;
    for (int32_t h = 0; h < group_; ++h) {
      const int64_t head = int64_t{item_.kv_head} * group_ + h;
      const int64_t first = int64_t{h} * item_.rows;
      row_kernels<T>().normalise(all.output + first * dim_, all.row_sum + first, item_.rows, dim_,
                                 args_.out + int64_t{item_.row} * ld + head * dim_, ld);
    }
  }

  const AttentionArgs<T>& args_;
  const AttentionItem& item_;
  Scratch<T>& s_;
  const int32_t dim_;
  const int32_t block_tokens_;
  const int32_t span_;
  const int32_t group_;
  const int32_t live_;
  const int32_t last_;  // the last key that a row sees
  const AttendBlock attend_block_;
  const int32_t rows_;
  T* q_ = nullptr;     // the item's queries
  int32_t first_ = 0;  // the first key, at the start of a block
  int32_t end_ = 0;
};

}  // namespace flowprefill
