// Body of attention for sequences that decode: at most 16 entries (row, query head), so one warp's
// matrix products hold them all. Called by attention_body.h, on the device and on the host.
//
// A block of 4 warps computes one tile; of each 64 keys, warp w takes 16 w to 16 w + 15. A warp has
// a ring of buffers of 16 keys or values in shared memory, which only it fills and reads: none
// waits for another until the end, when maxima, sums and outputs of the four are added in their
// order.
//
// Reading the cache is what takes time, not arithmetic, so bytes in flight decide: a warp asks for
// the next 16 keys as soon as a buffer is free, and for their table entry one step before that.
//
// Which warp takes a key depends on its position alone, so a row's bits do not depend on the batch.
#pragma once

#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/attention_merge_body.h"
#include "devices/cuda/kernels/mma_layout.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

template <int kDim, class Thread>
class AttentionDecode {
 public:
  // index: of the tile.
  FP_HD AttentionDecode(const Thread& t, const AttentionArgs& args, int32_t index)
      : t_(t), args_(args), tile_(args.tiles[index]), group_(args.heads / args.kv_heads) {}

  // The tile is no padding. All threads have to leave it before shared memory is used again.
  FP_HD void run() {
    int32_t begin = args_.window > 0 ? larger(0, tile_.position - args_.window + 1) : 0;
    end_ = position_of(tile_.entries - 1) + 1;
    if (tile_.chunk_keys > 0) {
      begin = larger(begin, tile_.chunk * tile_.chunk_keys);
      end_ = smaller(end_, (tile_.chunk + 1) * tile_.chunk_keys);
      if (begin >= end_)  // the chunk lies before the window
        return;
    }
    int32_t key = begin / kBlockKeys * kBlockKeys + t_.warp() * kKeys;
    next_ = key;
    read_table();
    if constexpr (kSharesQueries) {
      t_.wait_for_predecessor();
      copy_queries();
      fill_ring();
      await(0);  // its group has the queries too
      t_.sync();
    } else {
      fill_ring();
      t_.wait_for_predecessor();
      read_queries();
    }
    for (int32_t buffer = 0; key < end_; key += kBlockKeys) {
      multiply_queries(await(buffer));
      refill_keys(buffer);
      cap();
      mask(key);
      update_softmax();
      multiply_values(await(buffer + 1));
      refill_values(buffer + 1);
      buffer = buffer + 2 == kBuffers ? 0 : buffer + 2;
    }
    share();
    t_.sync();
    for (int32_t e = t_.warp(); e < tile_.entries; e += kWarps)
      add_warps(e);
  }

 private:
  static constexpr int32_t kWarps = kAttentionEntries / 16;
  static constexpr int32_t kKeys = 16;  // that a warp takes at once: the depth of a product
  static constexpr int32_t kBlockKeys = kWarps * kKeys;
  static constexpr int32_t kBuffers = decode_buffers(kDim);
  static constexpr bool kSharesQueries = shares_queries(kDim);
  static constexpr int kDepthSteps = kDim / 16;  // of the query-key product
  static constexpr int kOutColumns = kDim / 8;   // 8-wide columns of the output
  static constexpr int32_t kWords = kDim / 8;    // 16-byte words of a key
  static constexpr int32_t kStride = attention_stride(kDim);
  // That the lanes copy at once, one word each; 0: not whole ones.
  static constexpr int32_t kRowsAtOnce = 32 % kWords == 0 ? 32 / kWords : 0;
  static constexpr int32_t kColumns = kDim / 32;  // dimensions of a lane where warps are added
  static_assert(kBuffers % 2 == 0, "keys and values take turns");
  static_assert(kBlockKeys == kChunkStep, "chunks start where warps' turns do");

  FP_HD Bf16* ring(int32_t warp) const {
    return t_.template shared<Bf16>() + warp * kBuffers * kKeys * kStride;
  }
  FP_HD Bf16* buffer_at(int32_t buffer) const { return ring(t_.warp()) + buffer * kKeys * kStride; }
  FP_HD Bf16* shared_queries() const { return ring(kWarps); }
  // A warp's result of one entry, over its ring: output, maximum, sum.
  FP_HD float* shared_out(int32_t warp, int32_t entry) const {
    return reinterpret_cast<float*>(ring(warp)) + entry * kStride;
  }

  FP_HD int32_t position_of(int32_t entry) const { return tile_.position + entry / group_; }
  FP_HD int64_t offset_of(int32_t entry, int64_t ld) const {
    const int32_t head = (args_.kv_begin + t_.block_y()) * group_ + entry % group_;
    return (tile_.row + entry / group_) * ld + static_cast<int64_t>(head) * kDim;
  }

  // ---- the cache

  FP_HD const int32_t* table() const {
    return args_.block_tables + (tile_.sequence - 1) * args_.block_table_stride;
  }
  FP_HD bool has_large_blocks() const { return args_.cache.block_shift >= 4; }

  // Where 16 keys lie in one block, its number is read ahead.
  FP_HD void read_table() {
    if (has_large_blocks() && next_ < end_)
      block_ = table()[next_ >> args_.cache.block_shift];
  }

  // Elements from the first of the cache to key next_ + row of this KV head.
  FP_HD int64_t cache_offset(int32_t row) const {
    const CacheView& cache = args_.cache;
    const int64_t head = (args_.kv_begin + t_.block_y()) * cache.head_stride;
    if (!has_large_blocks())
      return cache.offset(table(), next_ + row) + head;
    const int32_t slot = (next_ & ((1 << cache.block_shift) - 1)) + row;
    return block_ * cache.block_stride + slot * cache.token_stride + head;
  }

  // Starts copying 16 keys or values from next_ on, a group of their own, which is empty beyond the
  // end; rows from end_ on are zeros, so that no NaN meets a masked key's zero probability.
  FP_HD void copy(const Bf16* cache, int32_t buffer) const {
    if (next_ < end_) {
      if (kRowsAtOnce > 0 && has_large_blocks())
        copy_of_block(cache, buffer_at(buffer));
      else
        copy_rows(cache, buffer_at(buffer));
    }
    t_.end_copies();
  }

  // All lie in one block: addresses are one and a step. (Beyond the end they are the block's too.)
  FP_HD void copy_of_block(const Bf16* cache, Bf16* to) const {
    const int32_t row = t_.lane() / kWords;
    const int32_t column = t_.lane() % kWords * 8;
    const int64_t step = kRowsAtOnce * args_.cache.token_stride;
    const Bf16* from = cache + cache_offset(row) + column;
    to += row * kStride + column;
    FP_UNROLL for (int i = 0; i < kKeys * kWords / 32; ++i) {
      t_.copy_16(to + i * kRowsAtOnce * kStride, from, next_ + row + i * kRowsAtOnce < end_);
      from += step;
    }
  }

  FP_HD void copy_rows(const Bf16* cache, Bf16* to) const {
    FP_UNROLL for (int i = 0; i < kKeys * kWords / 32; ++i) {
      const int32_t word = i * 32 + t_.lane();
      const int32_t row = word / kWords;
      const int32_t column = word % kWords * 8;
      const bool is_valid = next_ + row < end_;
      const int64_t offset = is_valid ? cache_offset(row) + column : 0;
      t_.copy_16(to + row * kStride + column, cache + offset, is_valid);
    }
  }

  FP_HD void copy_keys(int32_t buffer) const { copy(args_.cache.keys, buffer); }
  FP_HD void copy_values(int32_t buffer) {
    copy(args_.cache.values, buffer);
    next_ += kBlockKeys;
    read_table();
  }

  // Whether this run's kernels may still write some of the 16 keys from next_ on: its rows of the
  // sequence, of which a slice may hold only the last ones.
  FP_HD bool has_new_keys() const {
    return next_ < end_ && next_ + kKeys > tile_.position - kDecodeEntries / group_ + 1;
  }
  // What is older than the run is on its way while the kernel before still runs.
  FP_HD void fill_ring() {
    FP_UNROLL for (int32_t buffer = 0; buffer < kBuffers; buffer += 2) {
      if (has_new_keys())
        t_.wait_for_predecessor();
      copy_keys(buffer);
      copy_values(buffer + 1);
    }
  }

  // The buffer whose copy was started first, once it is there for all lanes.
  FP_HD const Bf16* await(int32_t buffer) const {
    t_.template wait_for_copies_but<kBuffers - 1>();
    t_.sync_warp();
    return buffer_at(buffer);
  }
  FP_HD void refill_keys(int32_t buffer) const {
    t_.sync_warp();  // all lanes have read it
    copy_keys(buffer);
  }
  FP_HD void refill_values(int32_t buffer) {
    t_.sync_warp();
    copy_values(buffer);
  }

  // ---- queries

  // Starts copying them, as part of the first group.
  FP_HD void copy_queries() const {
    FP_UNROLL for (int i = 0; i < kDecodeEntries * kWords / (32 * kWarps); ++i) {
      const int32_t word = i * 32 * kWarps + t_.index();
      const int32_t e = word / kWords;
      const int32_t column = word % kWords * 8;
      const bool is_live = e < tile_.entries;
      const Bf16* from = args_.q + (is_live ? offset_of(e, args_.ld_q) + column : 0);
      t_.copy_16(shared_queries() + e * kStride + column, from, is_live);
    }
  }

  FP_HD void read_queries() {
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      const int32_t e = t_.lane() / 4 + 8 * half;
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

  // ---- products, as in attention_body.h

  FP_HD void multiply_queries(const Bf16* keys) {
    const int32_t matrix = t_.lane() / 8;
    const int32_t in_matrix = t_.lane() % 8;
    const Bf16* row = keys + (matrix / 2 * 8 + in_matrix) * kStride + matrix % 2 * 8;
    const Bf16* query = shared_queries() + (matrix % 2 * 8 + in_matrix) * kStride + matrix / 2 * 8;
    FP_UNROLL for (int i = 0; i < 4; ++i) scores_[0][i] = scores_[1][i] = 0.0f;
    FP_UNROLL for (int step = 0; step < kDepthSteps; ++step) {
      uint32_t(&a)[4] = queries_[kSharesQueries ? 0 : step];
      if constexpr (kSharesQueries)
        t_.load_matrices(query + step * 16, a);
      uint32_t b[4];
      t_.load_matrices(row + step * 16, b);
      t_.multiply_add(scores_[0], a, b[0], b[1]);
      t_.multiply_add(scores_[1], a, b[2], b[3]);
    }
  }

  FP_HD void multiply_values(const Bf16* values) {
    const int32_t matrix = t_.lane() / 8;
    const Bf16* row = values + (matrix % 2 * 8 + t_.lane() % 8) * kStride + matrix / 2 * 8;
    const float* left = scores_[0];
    const float* right = scores_[1];
    const uint32_t p[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                           pack_bf16(right[0], right[1]), pack_bf16(right[2], right[3])};
    FP_UNROLL for (int n = 0; n < kOutColumns; n += 2) {
      uint32_t b[4];
      t_.load_matrices_transposed(row + n * 8, b);
      t_.multiply_add(out_[n], p, b[0], b[1]);
      t_.multiply_add(out_[n + 1], p, b[2], b[3]);
    }
  }

  // ---- softmax, as in attention_body.h

  FP_HD void cap() {
    if (args_.softcap <= 0.0f)
      return;
    const float inverse = 1.0f / args_.softcap;
    FP_UNROLL for (int i = 0; i < 8; ++i) scores_[i / 4][i % 4] =
        soft_cap(scores_[i / 4][i % 4], args_.softcap, inverse);
  }

  FP_HD void mask(int32_t key) {
    if (key + kKeys - 1 <= tile_.position && args_.window <= 0)  // all is seen
      return;
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      const int32_t position = position_of(t_.lane() / 4 + 8 * half);
      const int32_t first = args_.window > 0 ? position - args_.window + 1 : 0;
      FP_UNROLL for (int n = 0; n < 2; ++n) {
        FP_UNROLL for (int i = 2 * half; i < 2 * half + 2; ++i) {
          const int32_t at = key + n * 8 + c_column(t_.lane(), i);
          if (at > position || at < first)
            scores_[n][i] = minus_infinity();
        }
      }
    }
  }

  FP_HD void update_softmax() {
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      float* left = scores_[0] + 2 * half;
      float* right = scores_[1] + 2 * half;
      float peak = peaks_[half];
      FP_UNROLL for (int i = 0; i < 2; ++i) peak = more(peak, more(left[i], right[i]));
      peak = more(peak, t_.shuffle_xor(peak, 1));
      peak = more(peak, t_.shuffle_xor(peak, 2));
      const float base = finite(peak);
      const float keep = exp2_of(peaks_[half] - base);
      peaks_[half] = peak;
      FP_UNROLL for (int i = 0; i < 2; ++i) {
        left[i] = exp2_of(left[i] - base);
        right[i] = exp2_of(right[i] - base);
      }
      sums_[half] = sums_[half] * keep + ((left[0] + left[1]) + (right[0] + right[1]));
      FP_UNROLL for (int n = 0; n < kOutColumns; ++n) {
        out_[n][2 * half] *= keep;
        out_[n][2 * half + 1] *= keep;
      }
    }
  }

  static FP_HD float more(float a, float b) { return b > a ? b : a; }
  // Nothing seen yet: any finite number avoids inf - inf, all exponentials are 0.
  static FP_HD float finite(float peak) { return peak == minus_infinity() ? 0.0f : peak; }

  // ---- the warps' results

  FP_HD void share() {
    FP_UNROLL for (int half = 0; half < 2; ++half) {
      float sum = sums_[half];
      sum += t_.shuffle_xor(sum, 1);
      sum += t_.shuffle_xor(sum, 2);
      const int32_t e = t_.lane() / 4 + 8 * half;
      if (e >= tile_.entries)
        continue;
      float* to = shared_out(t_.warp(), e);
      FP_UNROLL for (int n = 0; n < kOutColumns; ++n) {
        const float* o = out_[n] + 2 * half;
        *reinterpret_cast<Vec<float, 2>*>(to + n * 8 + c_column(t_.lane(), 0)) = {o[0], o[1]};
      }
      if (t_.lane() % 4 == 0)
        *reinterpret_cast<Vec<float, 2>*>(to + kDim) = {peaks_[half], sum};
    }
  }

  // One entry's result over all warps; lane i takes dimensions i, i + 32, ...
  FP_HD void add_warps(int32_t e) {
    float peak = minus_infinity();
    FP_UNROLL for (int32_t warp = 0; warp < kWarps; ++warp) peak =
        more(peak, shared_out(warp, e)[kDim]);
    const float base = finite(peak);
    float sum = 0.0f;
    float out[kColumns] = {};
    FP_UNROLL for (int32_t warp = 0; warp < kWarps; ++warp) {
      const float* from = shared_out(warp, e);
      const float scale = exp2_of(from[kDim] - base);
      sum += from[kDim + 1] * scale;
      FP_UNROLL for (int i = 0; i < kColumns; ++i) out[i] += from[t_.lane() + 32 * i] * scale;
    }
    if (tile_.chunk_keys > 0)
      store_partial(e, out, peak, sum);
    else
      store_output(e, out, 1.0f / sum);
  }

  FP_HD void store_partial(int32_t e, const float (&out)[kColumns], float peak, float sum) const {
    const AttentionPartial<kDim> partial(args_, tile_, tile_.chunk, e, t_.block_y());
    FP_UNROLL for (int i = 0; i < kColumns; ++i) partial.out[t_.lane() + 32 * i] = out[i];
    if (t_.lane() == 0)
      *reinterpret_cast<Vec<float, 2>*>(partial.peak_and_sum) = {peak, sum};
  }

  FP_HD void store_output(int32_t e, const float (&out)[kColumns], float scale) const {
    Bf16* to = args_.out + offset_of(e, args_.ld_out) + t_.lane();
    FP_UNROLL for (int i = 0; i < kColumns; ++i) store(out[i] * scale, to + 32 * i);
  }

  const Thread& t_;
  const AttentionArgs& args_;
  const AttentionTile tile_;
  const int32_t group_;
  int32_t end_ = 0;    // of the keys
  int32_t next_ = 0;   // key from which on the warp asks for the next 16
  int32_t block_ = 0;  // of the cache, that they lie in
  uint32_t queries_[kSharesQueries ? 1 : kDepthSteps][4];
  float scores_[2][4];
  float out_[kOutColumns][4] = {};
  float peaks_[2] = {minus_infinity(), minus_infinity()};
  float sums_[2] = {};
};

}  // namespace flowprefill
