#include "devices/cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "devices/cpu/gemm.h"

namespace flowprefill {
namespace {

constexpr int32_t kTileKeys =
    256;  // keys per softmax tile: scores and probabilities stay in the L2 cache
constexpr int32_t kTargetRows = 96;  // query rows times heads per item

template <typename T>
struct Scratch {
  std::vector<T> q;
  std::vector<float> scores;
  std::vector<T> probabilities;
  std::vector<float> output;
  std::vector<float> row_max;
  std::vector<float> row_sum;
  std::vector<int> valid_lo;
  std::vector<int> valid_hi;

  void prepare(size_t rows, size_t dim, float no_maximum, size_t sums) {
    q.assign(rows * dim, T{});
    output.assign(rows * dim, 0.0f);
    row_max.assign(rows, no_maximum);
    row_sum.assign(rows * sums, 0.0f);
    valid_lo.assign(rows, 0);
    valid_hi.assign(rows, 0);
  }
  void prepare_tiles(size_t rows) {
    scores.resize(rows * kTileKeys);
    probabilities.resize(rows * kTileKeys);
  }
};

// Whether a block is attended in one pass with scores in registers. AMX multiplies faster than that
// saves.
bool is_fused(const RowKernels<Bf16>& kernels, int32_t dim, int32_t block_tokens) {
  return kernels.attend != nullptr && !has_amx() && dim % 16 == 0 && block_tokens % 16 == 0;
}
bool is_fused(const RowKernels<float>&, int32_t, int32_t) {
  return false;
}

// The products of one item; rows are ordered [head][row].
template <typename T>
class Attender {
 public:
  Attender(const AttentionArgs<T>& args, const AttentionItem& item, Scratch<T>& scratch)
      : args_(args),
        item_(item),
        s_(scratch),
        dim_(args.cache->layout().head_dim),
        block_tokens_(args.cache->layout().block_tokens),
        group_(args.num_heads / args.cache->layout().kv_heads) {
    live_ = item.rows * group_;
    const int32_t last = item.position + item.rows - 1;
    first_ = args.window > 0 ? std::max(0, item.position - args.window + 1) : 0;
    first_ -= first_ % block_tokens_;
    end_ = (last / block_tokens_ + 1) * block_tokens_;
  }

  void run() {
    if (is_fused(row_kernels<T>(), dim_, block_tokens_))
      run_blocks();
    else
      run_tiles();
  }

 private:
  // Block by block, in one pass each.
  void run_blocks() {
    if constexpr (sizeof(T) == sizeof(Bf16)) {
      rows_ = live_;
      s_.prepare(static_cast<size_t>(rows_), static_cast<size_t>(dim_), kNoMaximum, kSumLanes);
      gather_q();
      prefetch(first_);
      for (int32_t key = first_; key < end_; key += block_tokens_) {
        prefetch(key + block_tokens_);
        mask(key);
        row_kernels<T>().attend({.q = s_.q.data(),
                                 .keys = keys_at(key),
                                 .values = values_at(key),
                                 .rows = rows_,
                                 .dim = dim_,
                                 .tokens = block_tokens_,
                                 .valid_lo = s_.valid_lo.data(),
                                 .valid_hi = s_.valid_hi.data(),
                                 .row_max = s_.row_max.data(),
                                 .row_sum = s_.row_sum.data(),
                                 .output = s_.output.data(),
                                 .softcap = args_.softcap});
      }
      for (int32_t r = 0; r < rows_; ++r) {
        const float* lanes = s_.row_sum.data() + int64_t{r} * kSumLanes;
        s_.row_sum[static_cast<size_t>(r)] = std::accumulate(lanes, lanes + kSumLanes, 0.0f);
      }
      scatter_output();
    }
  }

  // Tile by tile: all scores, then their softmax, then the products with the values. Rows are
  // padded to a multiple of 16; padding stays masked.
  void run_tiles() {
    rows_ = live_ <= 4 ? live_ : (live_ + 15) / 16 * 16;
    s_.prepare(static_cast<size_t>(rows_), static_cast<size_t>(dim_),
               -std::numeric_limits<float>::infinity(), 1);
    s_.prepare_tiles(static_cast<size_t>(rows_));
    gather_q();
    const int32_t tile = std::max(kTileKeys / block_tokens_, 1) * block_tokens_;
    for (int32_t key = first_; key < end_; key += tile) {
      process_tile(key, std::min(tile, end_ - key));
    }
    scatter_output();
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

  // Blocks lie apart: no hardware foresees the next one.
  void prefetch(int32_t key) const {
    if (key >= end_)
      return;
    constexpr size_t kLine = 64;
    const auto* block = reinterpret_cast<const char*>(keys_at(key));  // values lie behind
    const size_t bytes = size_t{2} * sizeof(T) * static_cast<size_t>(dim_ * block_tokens_);
    for (size_t i = 0; i < bytes; i += kLine)
      __builtin_prefetch(block + i, 0, 2);
  }

  const T* q_head(int32_t head_in_group) const {
    const int64_t head = int64_t{item_.kv_head} * group_ + head_in_group;
    return args_.q + int64_t{item_.row} * args_.num_heads * dim_ + head * dim_;
  }

  void gather_q() {
    for (int32_t h = 0; h < group_; ++h) {
      const T* from = q_head(h);
      T* to = s_.q.data() + int64_t{h} * item_.rows * dim_;
      for (int32_t r = 0; r < item_.rows; ++r) {
        std::memcpy(to + int64_t{r} * dim_, from + int64_t{r} * args_.num_heads * dim_,
                    sizeof(T) * static_cast<size_t>(dim_));
      }
    }
  }

  void process_tile(int32_t key, int32_t keys) {
    const Block<T> scores{.n = block_tokens_,
                          .k = dim_,
                          .lda = dim_,
                          .ldb = block_tokens_,
                          .ldc = keys,
                          .add = false};
    for (int32_t k = 0; k < keys; k += block_tokens_) {
      brgemm(scores, rows_, s_.q.data(), keys_at(key + k), s_.scores.data() + k);
    }
    mask(key);
    row_kernels<T>().softmax({.scores = s_.scores.data(),
                              .ld = keys,
                              .rows = rows_,
                              .cols = keys,
                              .valid_lo = s_.valid_lo.data(),
                              .valid_hi = s_.valid_hi.data(),
                              .row_max = s_.row_max.data(),
                              .row_sum = s_.row_sum.data(),
                              .output = s_.output.data(),
                              .dim = dim_,
                              .softcap = args_.softcap},
                             s_.probabilities.data());
    const Block<T> shape{
        .n = dim_, .k = block_tokens_, .lda = keys, .ldb = dim_, .ldc = dim_, .add = true};
    for (int32_t k = 0; k < keys; k += block_tokens_) {
      brgemm(shape, rows_, s_.probabilities.data() + k, values_at(key + k), s_.output.data());
    }
  }

  // Which columns of the tile starting at `key` each row may see.
  void mask(int32_t key) {
    for (int32_t i = 0; i < live_; ++i) {
      const int32_t position = item_.position + i % item_.rows;
      s_.valid_hi[static_cast<size_t>(i)] = position + 1 - key;
      s_.valid_lo[static_cast<size_t>(i)] =
          args_.window > 0 ? position + 1 - args_.window - key : 0;
    }
  }

  void scatter_output() {
    const int64_t ld = int64_t{args_.num_heads} * dim_;
    for (int32_t h = 0; h < group_; ++h) {
      const int64_t head = int64_t{item_.kv_head} * group_ + h;
      const int64_t first = int64_t{h} * item_.rows;
      row_kernels<T>().normalise(s_.output.data() + first * dim_, s_.row_sum.data() + first,
                                 item_.rows, dim_,
                                 args_.out + int64_t{item_.row} * ld + head * dim_, ld);
    }
  }

  const AttentionArgs<T>& args_;
  const AttentionItem& item_;
  Scratch<T>& s_;
  int32_t dim_;
  int32_t block_tokens_;
  int32_t group_;
  int32_t first_ = 0;  // the first key, at the start of a block
  int32_t end_ = 0;
  int32_t live_ = 0;
  int32_t rows_ = 0;
};

}  // namespace

template <typename T>
void attend(const AttentionArgs<T>& args, const AttentionItem& item) {
  thread_local Scratch<T> scratch;
  Attender<T>(args, item, scratch).run();
}

template void attend<float>(const AttentionArgs<float>&, const AttentionItem&);
template void attend<Bf16>(const AttentionArgs<Bf16>&, const AttentionItem&);

int32_t attention_item_rows(int32_t rows, int32_t heads_per_kv, int32_t kv_heads, int32_t threads) {
  const int32_t target = std::max(1, kTargetRows / heads_per_kv);
  for (int32_t size = std::min(target, rows) / 16 * 16; size >= 16; size -= 16) {
    const int32_t items = (rows + size - 1) / size * kv_heads;
    const int32_t rounds = (items + threads - 1) / threads;
    if (10 * items >= 9 * rounds * threads)  // else threads wait for the last ones
      return size;
  }
  const int32_t share = std::max(1, rows * kv_heads / (2 * threads));  // two items a thread
  const int32_t size = std::min({target, share, rows});
  return size > 16 ? size / 16 * 16 : size;
}

}  // namespace flowprefill
