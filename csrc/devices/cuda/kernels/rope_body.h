// Body of the rope kernel: bias, head norm, rotation of queries and keys, and the write of keys and
// values into the paged cache. Called by row_kernels.cu and by tests/cpp/kernels.
#pragma once

#include "devices/cuda/kernels/row_args.h"
#include "devices/cuda/kernels/row_bodies.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

constexpr int32_t kMaxRopeDim = 256;
constexpr int kRopeSteps = kMaxRopeDim / 128;  // of a warp along half a head

// One head of one row, on one warp: lane l holds the pairs (i, i + head_dim / 2) of i = 2 l, 2 l +
// 1, then those 64 further on. So a warp moves whole lines of memory, and each lane two elements at
// once.
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
  template <typename T>
  FP_HD static Vec<T, 2> two(const T* from) {
    return *reinterpret_cast<const Vec<T, 2>*>(from);
  }

  // The first i of a step.
  FP_HD int32_t at(int step) const { return 2 * (t_.lane() + 32 * step); }
  FP_HD Bf16* query() const {
    return args_.q + row_ * args_.ld_q + static_cast<int64_t>(head_) * args_.head_dim;
  }

  FP_HD void load() {
    const int64_t column = static_cast<int64_t>(head_) * args_.head_dim;
    const In* in = args_.qkv + row_ * args_.ld_qkv + column;
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      if (at(p) >= half_)
        continue;
      const auto low = two(in + at(p));
      const auto high = two(in + half_ + at(p));
      FP_UNROLL for (int j = 0; j < 2; ++j) {
        low_[p][j] = widen(low.v[j]);
        high_[p][j] = widen(high.v[j]);
      }
      if (args_.bias != nullptr)
        add(args_.bias + column + at(p), p);
    }
  }

  FP_HD void add(const float* bias, int p) {
    const auto low = two(bias);
    const auto high = two(bias + half_);
    FP_UNROLL for (int j = 0; j < 2; ++j) {
      low_[p][j] += low.v[j];
      high_[p][j] += high.v[j];
    }
  }

  // RMS norm over the head (Qwen3), if the model has one. The same branch for the whole warp.
  FP_HD void norm(const float* weight) {
    if (weight == nullptr)
      return;
    float sum = 0.0f;
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      FP_UNROLL for (int j = 0; j < 2; ++j) sum +=
          low_[p][j] * low_[p][j] + high_[p][j] * high_[p][j];
    }
    const float scale = inverse_rms(warp_sum(t_, sum), args_.head_dim, args_.eps);
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      if (at(p) >= half_)
        continue;
      const auto low = two(weight + at(p));
      const auto high = two(weight + half_ + at(p));
      FP_UNROLL for (int j = 0; j < 2; ++j) {
        low_[p][j] *= scale * low.v[j];
        high_[p][j] *= scale * high.v[j];
      }
    }
  }

  FP_HD void rotate(float scale) {
    const float* rotary = args_.rotary + static_cast<int64_t>(row_) * args_.head_dim;
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      if (at(p) >= half_)
        continue;
      const auto cos = two(rotary + at(p));
      const auto sin = two(rotary + half_ + at(p));
      FP_UNROLL for (int j = 0; j < 2; ++j) {
        const float a = low_[p][j];
        const float b = high_[p][j];
        low_[p][j] = (a * cos.v[j] - b * sin.v[j]) * scale;
        high_[p][j] = (b * cos.v[j] + a * sin.v[j]) * scale;
      }
    }
  }

  FP_HD void store_pairs(Bf16* out) const {
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      if (at(p) >= half_)
        continue;
      store_two(low_[p], out + at(p));
      store_two(high_[p], out + half_ + at(p));
    }
  }
  FP_HD static void store_two(const float* values, Bf16* out) {
    *reinterpret_cast<Vec<Bf16, 2>*>(out) = {to_bf16(values[0]), to_bf16(values[1])};
  }

  const Thread& t_;
  const RopeArgs<In>& args_;
  const int32_t row_;
  const int32_t head_;
  const int32_t half_;
  float low_[kRopeSteps][2] = {};
  float high_[kRopeSteps][2] = {};
};

// block_x(): row; block_y(): a group of heads, one per warp, queries first, then keys, then values.
template <typename In, class Thread>
FP_HD void rope_body(const Thread& t, const RopeArgs<In>& args) {
  const int32_t head = t.block_y() * (t.count() / 32) + t.warp();
  if (head < args.heads + 2 * args.kv_heads)  // the same for the whole warp
    RopeHeadBody<In, Thread>(t, args, t.block_x(), head).run();
}

}  // namespace flowprefill
