// Body of the rope kernel: bias, norm, rotation of queries and keys, and the write of keys and
// values into the paged cache. Called by row_kernels.cu and by tests/cpp/kernels.
#pragma once

#include "devices/cuda/kernels/row_args.h"
#include "devices/cuda/kernels/row_bodies.h"
#include "devices/cuda/kernels/thread.h"

namespace flowprefill {

constexpr int32_t kMaxRopeDim = 256;
constexpr int kRopeSteps = kMaxRopeDim / 128;  // of a warp along half a head

// Turns a pair of dimensions by an angle, and scales it: with the same bits in every kernel.
FP_HD void turn(float cos, float sin, float scale, float* low, float* high) {
  const float a = *low;
  const float b = *high;
  *low = fused_multiply_add(a, cos, -(b * sin)) * scale;
  *high = fused_multiply_add(b, cos, a * sin) * scale;
}

// One head of one row, on one warp. Its dimensions make pairs: i and i + turning / 2 turn together;
// those that do not turn are paired alike, and only scaled. Lane l holds pairs 2 l and 2 l + 1,
// then those 64 further on. So a warp moves whole lines of memory, and each lane two elements at
// once.
//
// kNormsRows: the norm is over all heads of the row; the caller knows their 1 / rms.
template <bool kNormsRows, typename In, class Thread>
class RopeHeadBody {
 public:
  FP_HD RopeHeadBody(const Thread& t, const RopeArgs<In>& args, int32_t row, int32_t head,
                     float inverse_rms_of_row = 0.0f)
      : t_(t),
        args_(args),
        row_(row),
        head_(head),
        pairs_(args.head_dim / 2),
        half_(args.turning / 2),
        inverse_rms_of_row_(inverse_rms_of_row) {}

  // What the run's inputs say of the row: no kernel writes them, so this may be before the wait.
  FP_HD void find() {
    sequence_ = args_.batch.sequences[row_];
    if (sequence_ <= 0 || head_ < args_.heads)
      return;
    const int32_t* table =
        args_.batch.block_tables + (sequence_ - 1) * args_.batch.block_table_stride;
    offset_ = args_.cache.offset(table, args_.batch.positions[row_]);
  }

  // After find().
  FP_HD void run() {
    const bool is_query = head_ < args_.heads;
    if (sequence_ <= 0) {  // padding: attention reads no such row, but nothing stays undefined
      if (is_query)
        store_pairs(query());
      return;
    }
    load();
    if (is_query) {
      norm(args_.q_norm, head_);
      rotate(args_.q_scale);
      store_pairs(query());
      return;
    }
    const int32_t kv = head_ - args_.heads;
    const bool is_key = kv < args_.kv_heads;
    if (is_key) {
      norm(args_.k_norm, kv);
      rotate(1.0f);
    }
    Bf16* base = is_key ? args_.cache.keys : args_.cache.values;
    store_pairs(base + offset_ + (is_key ? kv : kv - args_.kv_heads) * args_.cache.head_stride);
  }

 private:
  template <typename T>
  FP_HD static Vec<T, 2> two(const T* from) {
    return *reinterpret_cast<const Vec<T, 2>*>(from);
  }

  // The first pair of a step; pairs come in twos, all of which turn or none does.
  FP_HD int32_t pair(int step) const { return 2 * (t_.lane() + 32 * step); }
  FP_HD bool turns(int step) const { return pair(step) < half_; }
  // Where the first of a pair lies in the head, and the second.
  FP_HD int32_t low(int step) const { return pair(step) + (turns(step) ? 0 : half_); }
  FP_HD int32_t high(int step) const { return low(step) + (turns(step) ? half_ : pairs_ - half_); }
  FP_HD Bf16* query() const {
    return args_.q + row_ * args_.ld_q + static_cast<int64_t>(head_) * args_.head_dim;
  }

  FP_HD void load() {
    const int64_t column = static_cast<int64_t>(head_) * args_.head_dim;
    const In* in = args_.qkv + row_ * args_.ld_qkv + column;
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      if (pair(p) >= pairs_)
        continue;
      const auto a = two(in + low(p));
      const auto b = two(in + high(p));
      FP_UNROLL for (int j = 0; j < 2; ++j) {
        low_[p][j] = widen(a.v[j]);
        high_[p][j] = widen(b.v[j]);
      }
      if (args_.bias != nullptr)
        add(args_.bias + column, p);
    }
  }

  FP_HD void add(const float* bias, int p) {
    const auto a = two(bias + low(p));
    const auto b = two(bias + high(p));
    FP_UNROLL for (int j = 0; j < 2; ++j) {
      low_[p][j] += a.v[j];
      high_[p][j] += b.v[j];
    }
  }

  // RMS norm, if the model has one: the same branch for the whole warp. index: of the head among
  // those that the weight is for.
  FP_HD void norm(const float* weight, int32_t index) {
    if (weight == nullptr)
      return;
    float inverse = inverse_rms_of_row_;
    if constexpr (kNormsRows)
      weight += static_cast<int64_t>(index) * args_.head_dim;
    else
      inverse = inverse_rms(warp_sum(t_, squares()), args_.head_dim, args_.eps);
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      if (pair(p) >= pairs_)
        continue;
      const auto a = two(weight + low(p));
      const auto b = two(weight + high(p));
      FP_UNROLL for (int j = 0; j < 2; ++j) {
        low_[p][j] *= inverse * a.v[j];
        high_[p][j] *= inverse * b.v[j];
      }
    }
  }

  FP_HD float squares() const {
    float sum = 0.0f;
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      FP_UNROLL for (int j = 0; j < 2; ++j) sum +=
          low_[p][j] * low_[p][j] + high_[p][j] * high_[p][j];
    }
    return sum;
  }

  FP_HD void rotate(float scale) {
    const float* rotary = args_.rotary + static_cast<int64_t>(row_) * args_.turning;
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      Vec<float, 2> cos = {{1.0f, 1.0f}};
      Vec<float, 2> sin = {};
      if (turns(p)) {
        cos = two(rotary + pair(p));
        sin = two(rotary + half_ + pair(p));
      }
      FP_UNROLL for (int j = 0; j < 2; ++j)
          turn(cos.v[j], sin.v[j], scale, &low_[p][j], &high_[p][j]);
    }
  }

  FP_HD void store_pairs(Bf16* out) const {
    FP_UNROLL for (int p = 0; p < kRopeSteps; ++p) {
      if (pair(p) >= pairs_)
        continue;
      store_two(low_[p], out + low(p));
      store_two(high_[p], out + high(p));
    }
  }
  FP_HD static void store_two(const float* values, Bf16* out) {
    *reinterpret_cast<Vec<Bf16, 2>*>(out) = {to_bf16(values[0]), to_bf16(values[1])};
  }

  const Thread& t_;
  const RopeArgs<In>& args_;
  const int32_t row_;
  const int32_t head_;
  const int32_t pairs_;
  const int32_t half_;  // pairs that turn
  const float inverse_rms_of_row_;
  int32_t sequence_ = 0;
  int64_t offset_ = 0;  // of keys and values: where the token lies in the cache
  float low_[kRopeSteps][2] = {};
  float high_[kRopeSteps][2] = {};
};

// Sum of the squares of `count` columns of a row after the bias, over the block. `shared` memory: a
// float per warp.
template <typename In, class Thread>
FP_HD float sum_of_squares(const Thread& t, const RopeArgs<In>& args, int32_t first,
                           int32_t count) {
  const In* in = args.qkv + t.block_x() * args.ld_qkv + first;
  float sum = 0.0f;
  for (int32_t i = 2 * t.index(); i < count; i += 2 * t.count()) {
    const auto x = *reinterpret_cast<const Vec<In, 2>*>(in + i);
    Vec<float, 2> bias = {};
    if (args.bias != nullptr)
      bias = *reinterpret_cast<const Vec<float, 2>*>(args.bias + first + i);
    FP_UNROLL for (int j = 0; j < 2; ++j) {
      const float value = widen(x.v[j]) + bias.v[j];
      sum += value * value;
    }
  }
  return block_sum(t, sum, t.template shared<float>());
}

// block_x(): row; block_y(): a group of heads, one per warp, queries first, then keys, then values.
// Not for args.norms_rows. May be launched while the kernel before it runs.
template <typename In, class Thread>
FP_HD void rope_body(const Thread& t, const RopeArgs<In>& args) {
  const int32_t head = t.block_y() * (t.count() / 32) + t.warp();
  RopeHeadBody<false, In, Thread> body(t, args, t.block_x(), head);
  body.find();
  t.wait_for_predecessor();
  if (head < args.heads + 2 * args.kv_heads)  // the same for the whole warp
    body.run();
}

constexpr int32_t kRopeRowParts = 3;

// The same for args.norms_rows. block_y(): 0 has all queries of the row, 1 all keys, 2 all values,
// of kRopeRowParts.
template <typename In, class Thread>
FP_HD void rope_rows_body(const Thread& t, const RopeArgs<In>& args) {
  const int32_t part = t.block_y();
  const int32_t begin = part == 0 ? 0 : args.heads + (part - 1) * args.kv_heads;
  const int32_t heads = part == 0 ? args.heads : args.kv_heads;
  float inverse = 0.0f;
  if (part < 2 && args.batch.sequences[t.block_x()] > 0) {  // the same for the whole block
    const int32_t columns = heads * args.head_dim;
    inverse =
        inverse_rms(sum_of_squares(t, args, begin * args.head_dim, columns), columns, args.eps);
  }
  for (int32_t head = begin + t.warp(); head < begin + heads; head += t.count() / 32) {
    RopeHeadBody<true, In, Thread> body(t, args, t.block_x(), head, inverse);
    body.find();
    body.run();
  }
}

}  // namespace flowprefill
