// What few_rows_body() does besides its product where norm and rope are fused (fused_product.h):
// the norms before it, and what becomes of a pair of its sums.
#pragma once

#include "devices/cuda/kernels/fused_product.h"
#include "devices/cuda/kernels/rope_body.h"
#include "devices/cuda/kernels/row_bodies.h"

namespace flowprefill {

// The norms of the product's rows, in normed_bytes() of shared memory from `shared` on. All threads
// have to come here. `meanwhile` is called while the first row's elements are on their way.
template <class Thread, class Meanwhile>
FP_HD const Bf16* norm_rows(const Thread& t, const FusedProduct& args, unsigned char* shared,
                            const Meanwhile& meanwhile) {
  Bf16* out = reinterpret_cast<Bf16*>(shared + kNormSumsBytes);
  const int32_t depth = args.product.depth;
  for (int32_t row = 0; row < args.product.rows(); ++row) {
    const float* hidden = args.norm.hidden + (args.product.row_begin + row) * args.norm.ld_hidden;
    NormOfRow<Thread> norm(t, hidden, args.norm.weight, depth);
    norm.load();
    if (row == 0)
      meanwhile();
    norm.finish(args.norm.eps, reinterpret_cast<float*>(shared), out + row * depth);
    t.sync();
  }
  return out;
}

// Columns of a block's turn where these are of heads that turn: kRopePairs dimensions of a head
// from `low` on, then those that turn with them, `apart` columns further on.
constexpr int32_t kRopePairs = 8;
struct RopeColumns {
  FP_HD RopeColumns(int32_t unit, int32_t head_dim)
      : head(unit / (head_dim / (2 * kRopePairs))),
        dimension(unit % (head_dim / (2 * kRopePairs)) * kRopePairs),
        low(head * head_dim + dimension),
        apart(head_dim / 2) {}

  int32_t head;
  int32_t dimension;  // the first of the pairs' lower ones, in its head
  int32_t low;
  int32_t apart;
};

// What follows a product of queries, keys and values, for one pair of dimensions of a thread's row:
// as RopeHeadBody does it.
class RopePair {
 public:
  // What the run's inputs say of the row: no kernel writes them, so this may be before the wait.
  // Nothing is done with it yet, so no thread waits for it here.
  FP_HD RopePair(const RopeArgs<Bf16>& args, int32_t row, int32_t pair)
      : args_(args), row_(row), pair_(pair) {
    if (row >= args.rows)
      return;
    sequence_ = args.batch.sequences[row];
    position_ = args.batch.positions[row];
  }

  // Where the token's keys and values lie in the cache.
  FP_HD void find() {
    if (sequence_ <= 0)
      return;
    const int32_t* table =
        args_.batch.block_tables + (sequence_ - 1) * args_.batch.block_table_stride;
    offset_ = args_.cache.offset(table, position_);
  }

  // The pair's angle in this unit: asked for before the sums are there.
  FP_HD void load(int32_t unit) {
    const float* rotary = args_.rotary + static_cast<int64_t>(row_) * args_.turning +
                          RopeColumns(unit, args_.head_dim).dimension + pair_;
    cos_ = rotary[0];
    sin_ = rotary[args_.turning / 2];
  }

  // The sums, first rounded as d would be.
  FP_HD void store_sums(int32_t unit, const float (&sums)[2]) const {
    const RopeColumns columns(unit, args_.head_dim);
    const int32_t dimension = columns.dimension + pair_;
    float low = widen(to_bf16(sums[0]));
    float high = widen(to_bf16(sums[1]));
    if (args_.bias != nullptr) {
      low += args_.bias[columns.low + pair_];
      high += args_.bias[columns.low + columns.apart + pair_];
    }
    const int32_t kv = columns.head - args_.heads;
    if (kv < 0) {
      Bf16* q = args_.q + row_ * args_.ld_q + int64_t{columns.head} * args_.head_dim + dimension;
      if (sequence_ <= 0)  // padding, as in RopeHeadBody::run()
        low = high = 0.0f;
      else
        turn(cos_, sin_, args_.q_scale, &low, &high);
      return store_pair(low, high, q);
    }
    if (sequence_ <= 0)
      return;
    const bool is_key = kv < args_.kv_heads;
    if (is_key)
      turn(cos_, sin_, 1.0f, &low, &high);
    Bf16* base = is_key ? args_.cache.keys : args_.cache.values;
    const int64_t head = is_key ? kv : kv - args_.kv_heads;
    store_pair(low, high, base + offset_ + head * args_.cache.head_stride + dimension);
  }

 private:
  FP_HD void store_pair(float low, float high, Bf16* out) const {
    out[0] = to_bf16(low);
    out[args_.head_dim / 2] = to_bf16(high);
  }

  const RopeArgs<Bf16>& args_;
  const int32_t row_;
  const int32_t pair_;
  int32_t sequence_ = 0;
  int32_t position_ = 0;
  int64_t offset_ = 0;
  float cos_ = 1;
  float sin_ = 0;
};

}  // namespace flowprefill
