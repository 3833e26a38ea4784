// Body of the rope kernel: bias, head norm, rotation of queries and keys, and the write of keys and
// values into the paged cache. Called by row_kernels.cu and by tests/cpp/kernels.
#pragma once

#include "devices/cuda/kernels/row_args.h"
#include "devices/cuda/kernels/row_bodies.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

constexpr int32_t kMaxRopeDim = 256;
constexpr int kRopePairs = kMaxRopeDim / 64;  // pairs (i, i + head_dim / 2) of one lane

// One head of one row, on one warp: lane l holds pairs l, l + 32, ...
template <typename In, class Thread>
class RopeHeadBody {
 public:
  FP_HD RopeHeadBody(const Thread& t, const RopeArgs<In>& args, int32_t row, int32_t head)
      : t_(t), args_(args), row_(row), head_(head), half_(args.head_dim / 2) {}

  FP_HD void run() {
    const int32_t sequence = args_.batch.sequences[row_];
    const bool is_query = head_ < args_.heads;
    if (sequence <= 0) {  // padding: attention reads no such row, but nothing stays undefined
      if (is_query)
        store_pairs(query());
      return;
    }
    load();
    if (is_query) {
      norm(args_.q_norm);
      rotate(args_.q_scale);
      store_pairs(query());
      return;
    }
    const int32_t kv = head_ - args_.heads;
    const bool is_key = kv < args_.kv_heads;
    if (is_key) {
      norm(args_.k_norm);
      rotate(1.0f);
    }
    const int32_t* table =
        args_.batch.block_tables + (sequence - 1) * args_.batch.block_table_stride;
    const int64_t offset = args_.cache.offset(table, args_.batch.positions[row_]);
    Bf16* base = is_key ? args_.cache.keys : args_.cache.values;
    store_pairs(base + offset + (is_key ? kv : kv - args_.kv_heads) * args_.cache.head_stride);
  }

 private:
  FP_HD int32_t pair(int p) const { return t_.lane() + 32 * p; }
  FP_HD Bf16* query() const {
    return args_.q + row_ * args_.ld_q + static_cast<int64_t>(head_) * args_.head_dim;
  }

  FP_HD void load() {
    const int64_t column = static_cast<int64_t>(head_) * args_.head_dim;
    const In* in = args_.qkv + row_ * args_.ld_qkv + column;
    FP_UNROLL for (int p = 0; p < kRopePairs; ++p) {
      if (pair(p) >= half_)
        continue;
      low_[p] = widen(in[pair(p)]);
      high_[p] = widen(in[half_ + pair(p)]);
      if (args_.bias != nullptr) {
        low_[p] += args_.bias[column + pair(p)];
        high_[p] += args_.bias[column + half_ + pair(p)];
      }
    }
  }

  // RMS norm over the head (Qwen3), if the model has one. The same branch for the whole warp.
  FP_HD void norm(const float* weight) {
    if (weight == nullptr)
      return;
    float sum = 0.0f;
    FP_UNROLL for (int p = 0; p < kRopePairs; ++p) sum += low_[p] * low_[p] + high_[p] * high_[p];
    const float scale = inverse_rms(warp_sum(t_, sum), args_.head_dim, args_.eps);
    FP_UNROLL for (int p = 0; p < kRopePairs; ++p) {
      if (pair(p) >= half_)
        continue;
      low_[p] *= scale * weight[pair(p)];
      high_[p] *= scale * weight[half_ + pair(p)];
    }
  }

  FP_HD void rotate(float scale) {
    const float* cos = args_.rotary + static_cast<int64_t>(row_) * args_.head_dim;
    const float* sin = cos + half_;
    FP_UNROLL for (int p = 0; p < kRopePairs; ++p) {
      if (pair(p) >= half_)
        continue;
      const float a = low_[p];
      const float b = high_[p];
      low_[p] = (a * cos[pair(p)] - b * sin[pair(p)]) * scale;
      high_[p] = (b * cos[pair(p)] + a * sin[pair(p)]) * scale;
    }
  }

  FP_HD void store_pairs(Bf16* out) const {
    FP_UNROLL for (int p = 0; p < kRopePairs; ++p) {
      if (pair(p) >= half_)
        continue;
      out[pair(p)] = to_bf16(low_[p]);
      out[half_ + pair(p)] = to_bf16(high_[p]);
    }
  }

  const Thread& t_;
  const RopeArgs<In>& args_;
  const int32_t row_;
  const int32_t head_;
  const int32_t half_;
  float low_[kRopePairs] = {};
  float high_[kRopePairs] = {};
};

// block_x(): row; block_y(): a group of heads, one per warp, queries first, then keys, then values.
template <typename In, class Thread>
FP_HD void rope_body(const Thread& t, const RopeArgs<In>& args) {
  const int32_t head = t.block_y() * (t.count() / 32) + t.warp();
  if (head < args.heads + 2 * args.kv_heads)  // the same for the whole warp
    RopeHeadBody<In, Thread>(t, args, t.block_x(), head).run();
}

}  // namespace flowprefill
