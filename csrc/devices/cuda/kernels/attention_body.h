// Body of the attention kernel: online softmax over key tiles with tensor-core products. Called by
// attention.cu on the device, by tests/cpp/kernels on the host.
//
// A block of 4 warps computes 64 entries (row, query head) of one sequence and one KV head; warp w
// owns entries 16 w to 16 w + 15 and needs no other warp but for filling shared memory. Scores and
// output stay in registers, queries too where there is room. Keys and values each have one buffer:
// while scores are computed the values arrive, while values are multiplied the next keys do.
//
// Key tiles start at multiples of their size of the position, so a row's result has the same bits
// however its prompt is sliced or batched: tiles in which it may see nothing change nothing.
//
// Where keys are split (flash-decoding), a block takes tiles of one chunk of the keys in turn and
// writes maximum, sum and output of its chunk as float; attention_merge_body.h puts them together.
// Chunks start at multiples of their size of the position, for the same reason.
//
// Tiles of sequences that decode, a few entries each, are attention_decode_body.h's.
#pragma once

#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/attention_decode_body.h"
#include "devices/cuda/kernels/attention_merge_body.h"
#include "devices/cuda/kernels/mma_layout.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

template <int kDim, class Thread>
class AttentionBody {
 public:
  // index: of the tile.
  FP_HD AttentionBody(const Thread& t, const AttentionArgs& args, int32_t index)
      : t_(t),
        args_(args),
        index_(index),
        tile_(args.tiles[index]),
        group_(args.heads / args.kv_heads) {}

  // The tile is no padding.
  FP_HD void run() {
    t_.wait_for_predecessor();
    const int32_t last = smaller(tile_.entry + kAttentionEntries, tile_.entries) - 1;
    int32_t end = position_of(last) + 1;
    int32_t begin = first_key();
    if (tile_.chunk_keys > 0) {
      begin = larger(begin, tile_.chunk * tile_.chunk_keys);
      end = smaller(end, (tile_.chunk + 1) * tile_.chunk_keys);
      if (begin >= end)  // the chunk lies before the window
        return;
    }
    begin = begin / kKeys * kKeys;
    load_queries();
    copy(args_.cache.keys, keys(), begin, end);
    for (int32_t key = begin; key < end; key += kKeys) {
      t_.wait_for_copies();
      t_.sync();  // the keys are here, and no thread reads the last values any more
      copy(args_.cache.values, values(), key, end);
      multiply_queries();
      cap();
      mask(key);
      update_softmax();
      t_.wait_for_copies();
      t_.sync();  // the values are here, and no thread reads the keys any more
      if (key + kKeys < end)
        copy(args_.cache.keys, keys(), key + kKeys, end);
      multiply_values();
    }
    store();
  }

 private:
  static constexpr int kThreads = kAttentionEntries / 16 * 32;
  static constexpr int32_t kKeys = attention_keys(kDim);
  static constexpr bool kSharesQueries = shares_queries(kDim);
  static constexpr int kDepthSteps = kDim / 16;               // of the query-key product
  static constexpr int kKeyColumns = kKeys / 8;               // 8-wide columns of the scores
  static constexpr int kOutColumns = kDim / 8;                // 8-wide columns of the output
  static constexpr int kKeySteps = kKeys / 16;                // depth of the value product
  static constexpr int32_t kWords = kDim / 8;                 // 16-byte words of a key
  static constexpr int32_t kStride = attention_stride(kDim);  // elements

  FP_HD Bf16* keys() const { return t_.template shared<Bf16>(); }
  FP_HD Bf16* values() const { return keys() + kKeys * kStride; }
  FP_HD Bf16* shared_queries() const { return values() + kKeys * kStride; }

  // ---- which entry, row and position

  // Entry of this lane's upper (0) or lower (1) row of the warp's 16.
  FP_HD int32_t entry(int half) const {
    return tile_.entry + t_.warp() * 16 + t_.lane() / 4 + 8 * half;
  }
  FP_HD int32_t kv_head() const { return args_.kv_begin + t_.block_y(); }
  FP_HD int32_t position_of(int32_t entry) const { return tile_.position + entry / group_; }
  // Elements from the first of row 0 to the entry's head.
  FP_HD int64_t offset_of(int32_t entry, int64_t ld) const {
    const int32_t head = kv_head() * group_ + entry % group_;
    return (tile_.row + entry / group_) * ld + static_cast<int64_t>(head) * kDim;
  }
  // First key that any entry of the tile sees.
  FP_HD int32_t first_key() const {
    if (args_.window <= 0)
      return 0;
    return larger(0, position_of(tile_.entry) - args_.window + 1);
  }

  // ---- memory

  FP_HD void load_queries() {
    if constexpr (kSharesQueries)
      copy_queries();
    else
      read_queries();
  }

  // Starts copying the tile's queries, zeros beyond its last entry.
  FP_HD void copy_queries() const {
    FP_UNROLL for (int i = 0; i < kAttentionEntries * kWords / kThreads; ++i) {
      const int32_t word = i * kThreads + t_.index();
      const int32_t row = word / kWords;
      const int32_t column = word % kWords * 8;
      const int32_t e = tile_.entry + row;
      const bool is_live = e < tile_.entries;
      const Bf16* from = args_.q + (is_live ? offset_of(e, args_.ld_q) + column : 0);
      t_.copy_16(shared_queries() + row * kStride + column, from, is_live);
    }
  }

  FP_HD void read_queries() {
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      const int32_t e = entry(half);
      const bool is_live = e < tile_.entries;
      const Bf16* q = args_.q + (is_live ? offset_of(e, args_.ld_q) : 0);
      FP_UNROLL for (int step = 0; step < kDepthSteps; ++step) {
        FP_UNROLL for (int side = 0; side < 2; ++side) {
          const int i = half + 2 * side;  // register whose a_row is this half
          const Bf16* from = q + step * 16 + a_column(t_.lane(), i);
          queries_[step][i] = is_live ? *reinterpret_cast<const uint32_t*>(from) : 0;
        }
      }
    }
  }

  // Starts copying a tile of keys or values; rows from `end` on are zeros, so that nothing
  // undefined (a NaN) meets the zero probability of a masked key.
  FP_HD void copy(const Bf16* cache, Bf16* to, int32_t key, int32_t end) const {
    const int32_t* table = args_.block_tables + (tile_.sequence - 1) * args_.block_table_stride;
    const int64_t head = kv_head() * args_.cache.head_stride;
    FP_UNROLL for (int i = 0; i < kKeys * kWords / kThreads; ++i) {
      const int32_t word = i * kThreads + t_.index();
      const int32_t row = word / kWords;
      const int32_t column = word % kWords * 8;
      const bool is_valid = key + row < end;
      const int64_t offset = is_valid ? args_.cache.offset(table, key + row) + head + column : 0;
      t_.copy_16(to + row * kStride + column, cache + offset, is_valid);
    }
  }

  FP_HD void store() {
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      float sum = sums_[half];
      sum += t_.shuffle_xor(sum, 1);
      sum += t_.shuffle_xor(sum, 2);
      const int32_t e = entry(half);
      if (e >= tile_.entries)
        continue;
      // Read again: registers are scarce while keys are multiplied.
      if (args_.tiles[index_].chunk_keys > 0)
        store_partial(half, e, sum);
      else
        store_output(half, e, 1.0f / sum);
    }
  }

  FP_HD void store_output(int half, int32_t e, float scale) {
    Bf16* out = args_.out + offset_of(e, args_.ld_out) + c_column(t_.lane(), 0);
    FP_UNROLL for (int n = 0; n < kOutColumns; ++n) {
      const float* o = out_[n] + 2 * half;
      *reinterpret_cast<uint32_t*>(out + n * 8) = pack_bf16(o[0] * scale, o[1] * scale);
    }
  }

  FP_HD void store_partial(int half, int32_t e, float sum) {
    const AttentionTile& tile = args_.tiles[index_];
    const AttentionPartial<kDim> partial(args_, tile, tile.chunk, e, t_.block_y());
    FP_UNROLL for (int n = 0; n < kOutColumns; ++n) {
      const float* o = out_[n] + 2 * half;
      *reinterpret_cast<Vec<float, 2>*>(partial.out + n * 8 + c_column(t_.lane(), 0)) = {o[0],
                                                                                         o[1]};
    }
    if (t_.lane() % 4 == 0)
      *reinterpret_cast<Vec<float, 2>*>(partial.peak_and_sum) = {peaks_[half], sum};
  }

  // ---- products

  // scores = queries * keys^T, 16 keys at once: matrices (keys 0-7 | 8-15) x (depth 0-7 | 8-15).
  FP_HD void multiply_queries() {
    const int32_t matrix = t_.lane() / 8;
    const Bf16* row = keys() + (matrix / 2 * 8 + t_.lane() % 8) * kStride + matrix % 2 * 8;
    FP_UNROLL for (int n = 0; n < kKeyColumns; ++n) {
      FP_UNROLL for (int i = 0; i < 4; ++i) scores_[n][i] = 0.0f;
    }
    FP_UNROLL for (int step = 0; step < kDepthSteps; ++step) {
      uint32_t(&a)[4] = queries_[kSharesQueries ? 0 : step];
      if constexpr (kSharesQueries)
        load_queries_of(step, a);
      FP_UNROLL for (int n = 0; n < kKeyColumns; n += 2) {
        uint32_t b[4];
        t_.load_matrices(row + n * 8 * kStride + step * 16, b);
        t_.multiply_add(scores_[n], a, b[0], b[1]);
        t_.multiply_add(scores_[n + 1], a, b[2], b[3]);
      }
    }
  }

  // The warp's 16 entries, 16 columns of them: matrices (rows 0-7 | 8-15) x (columns 0-7 | 8-15).
  FP_HD void load_queries_of(int step, uint32_t (&a)[4]) const {
    const int32_t matrix = t_.lane() / 8;
    const int32_t row = t_.warp() * 16 + matrix % 2 * 8 + t_.lane() % 8;
    t_.load_matrices(shared_queries() + row * kStride + step * 16 + matrix / 2 * 8, a);
  }

  // out += probabilities * values. The scores' registers, rounded to bf16, are the left operand as
  // they lie: columns 16 s to 16 s + 15 are the two score columns 2 s and 2 s + 1.
  FP_HD void multiply_values() {
    const int32_t matrix = t_.lane() / 8;
    const Bf16* row = values() + (matrix % 2 * 8 + t_.lane() % 8) * kStride + matrix / 2 * 8;
    FP_UNROLL for (int step = 0; step < kKeySteps; ++step) {
      const float* left = scores_[2 * step];
      const float* right = scores_[2 * step + 1];
      const uint32_t p[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                             pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3])};
      FP_UNROLL for (int n = 0; n < kOutColumns; n += 2) {
        uint32_t b[4];
        t_.load_matrices_transposed(row + step * 16 * kStride + n * 8, b);
        t_.multiply_add(out_[n], p, b[0], b[1]);
        t_.multiply_add(out_[n + 1], p, b[2], b[3]);
      }
    }
  }

  // ---- softmax

  FP_HD void cap() {
    if (args_.softcap <= 0.0f)  // the same for the whole launch
      return;
    const float inverse = 1.0f / args_.softcap;
    FP_UNROLL for (int n = 0; n < kKeyColumns; ++n) {
      FP_UNROLL for (int i = 0; i < 4; ++i) scores_[n][i] =
          soft_cap(scores_[n][i], args_.softcap, inverse);
    }
  }

  FP_HD void mask(int32_t key) {
    const bool sees_all = key + kKeys - 1 <= position_of(tile_.entry) &&
                          args_.window <= 0;  // the same for the whole block
    if (sees_all)
      return;
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      const int32_t position = position_of(entry(half));
      const int32_t first = args_.window > 0 ? position - args_.window + 1 : 0;
      FP_UNROLL for (int n = 0; n < kKeyColumns; ++n) {
        FP_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int32_t at = key + n * 8 + c_column(t_.lane(), i);
          if (at > position || at < first)
            scores_[n][i] = minus_infinity();
        }
      }
    }
  }

  // scores become 2^(score - maximum); sums_ stay partial per lane until the end.
  FP_HD void update_softmax() {
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      float peak = peaks_[half];
      FP_UNROLL for (int n = 0; n < kKeyColumns; ++n) {
        FP_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
          peak = scores_[n][i] > peak ? scores_[n][i] : peak;
        }
      }
      FP_UNROLL for (int lanes = 1; lanes < 4; lanes *= 2) {
        const float other = t_.shuffle_xor(peak, lanes);
        peak = other > peak ? other : peak;
      }
      // Nothing seen yet: any finite number avoids inf - inf, all exponentials are 0.
      const float base = peak == minus_infinity() ? 0.0f : peak;
      const float keep = exp2_of(peaks_[half] - base);
      peaks_[half] = peak;
      float sum = 0.0f;
      FP_UNROLL for (int n = 0; n < kKeyColumns; ++n) {
        FP_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores_[n][i] = exp2_of(scores_[n][i] - base);
          sum += scores_[n][i];
        }
      }
      sums_[half] = sums_[half] * keep + sum;
      FP_UNROLL for (int n = 0; n < kOutColumns; ++n) {
        out_[n][2 * half] *= keep;
        out_[n][2 * half + 1] *= keep;
      }
    }
  }

  const Thread& t_;
  const AttentionArgs& args_;
  const int32_t index_;
  const AttentionTile tile_;
  const int32_t group_;
  uint32_t queries_[kSharesQueries ? 1 : kDepthSteps][4];
  float scores_[kKeyColumns][4];
  float out_[kOutColumns][4] = {};
  float peaks_[2] = {minus_infinity(), minus_infinity()};
  float sums_[2] = {};
};

// block_x(): of num_blocks_of() blocks, which take the tiles in turn: a graph's list has room for
// far more chunks than most batches have, and blocks for all of them would cost more than the
// attention. Padding comes last. block_y(): KV head, from kv_begin on; 128 threads. May be launched
// while the kernel before it runs: tiles and block tables are no kernel's.
template <int kDim, class Thread>
FP_HD void attention_body(Thread t, const AttentionArgs& args) {
  for (int32_t i = t.block_x(); i < args.num_tiles; i += num_blocks_of(args)) {
    if (args.tiles[i].sequence <= 0)
      break;
    t.recompute();
    if (args.tiles[i].is_decode != 0)
      AttentionDecode<kDim, Thread>(t, args, i).run();
    t.recompute();
    // Read again, and no else: registers for what is computed for both are not there.
    if (args.tiles[i].is_decode == 0)
      AttentionBody<kDim, Thread>(t, args, i).run();
    t.recompute();
    t.sync();  // the next tile may use shared memory otherwise
  }
  t.wait_for_predecessor();  // blocks without a tile too
}

}  // namespace flowprefill
