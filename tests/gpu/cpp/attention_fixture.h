// What the tests of attention on the device share: ragged batches over a paged cache, the kernels'
// arguments, their results next to plain loops in double.
#pragma once

#include <algorithm>
#include <span>
#include <tuple>

#include "device_test.h"
#include "devices/cuda/kernels/attention_split.h"

namespace flowprefill::testing {

struct Part {
  int32_t context;
  int32_t rows;
};

struct Shape {
  int32_t heads = 2;
  int32_t kv_heads = 1;
  int32_t head_dim = 64;
  int32_t block_shift = 4;
  int32_t window = 0;
  float softcap = 0;
  std::vector<Part> parts = {};
};

// A probability is rounded once to bf16, both results once each: shares of the sum of p |v|.
inline constexpr double kAllowed = 3 * kBf16Rounding + 1e-5;

class Attention : public DeviceTest {
 protected:
  void make(const Shape& shape) {
    forget();
    shape_ = shape;
    slices_.clear();
    rows_ = 0;
    const int32_t block_tokens = 1 << shape.block_shift;
    table_stride_ = 1;
    for (const Part& part : shape.parts) {
      const auto sequence = static_cast<int32_t>(slices_.size());
      slices_.push_back(
          {.row = rows_, .rows = part.rows, .position = part.context, .sequence = sequence});
      rows_ += part.rows;
      table_stride_ =
          std::max(table_stride_, (part.context + part.rows + block_tokens - 1) / block_tokens);
    }
    head_stride_ = int64_t{shape.head_dim} << shape.block_shift;
    block_stride_ = head_stride_ * shape.kv_heads;
    const int32_t blocks = table_stride_ * static_cast<int32_t>(slices_.size());
    const auto slots = static_cast<size_t>(blocks * block_stride_);
    tables_ = &add("block_tables", permutation(blocks));
    q_ = &add("q", halves(static_cast<size_t>(rows_ * ld()), 0.5f));
    // Slots that hold no token are NaN: reading one spoils the result.
    keys_ = &add("keys", filled_halves(slots));
    values_ = &add("values", filled_halves(slots));
    for (size_t i = 0; i < slices_.size(); ++i)
      fill(slices_[i]);
    out_ = &add("out", filled_halves(static_cast<size_t>((rows_ + 1) * ld())));
    tiles_ = nullptr;
  }

  int64_t ld() const { return int64_t{shape_.heads} * shape_.head_dim; }
  int32_t group() const { return shape_.heads / shape_.kv_heads; }
  CacheView cache(Place p) {
    return {keys_->at(p),    values_->at(p), block_stride_,
            shape_.head_dim, head_stride_,   shape_.block_shift};
  }

  void fill(const AttentionSlice& slice) {
    const int32_t* table = tables_->initial().data() + slice.sequence * table_stride_;
    const CacheView view = cache(Place::kHost);
    for (int32_t position = 0; position < slice.position + slice.rows; ++position) {
      for (int32_t head = 0; head < shape_.kv_heads; ++head) {
        const int64_t at = view.offset(table, position) + head * head_stride_;
        std::ranges::copy(halves(static_cast<size_t>(shape_.head_dim)),
                          keys_->initial().begin() + at);
        std::ranges::copy(halves(static_cast<size_t>(shape_.head_dim)),
                          values_->initial().begin() + at);
      }
    }
  }

  // The lists of one launch over these slices.
  void set_tiles(std::vector<AttentionTile> tiles, std::span<const AttentionSlice> slices,
                 size_t padding = 0) {
    merges_ = attention_merges(attention_tiles(slices, group()));
    partial_rows_ = 0;
    for (const AttentionSlice& slice : slices)
      partial_rows_ += static_cast<int32_t>(partial_rows_of(slice, group()));
    tiles.resize(tiles.size() + padding);
    tiles_ = &add("tiles", std::move(tiles));
    if (merges_.empty())
      return;
    merges_.resize(merges_.size() + padding);
    device_merges_ = &add("merges", merges_);
    partials_ =
        DeviceBuffer(attention_partial_bytes(partial_rows_, shape_.kv_heads, shape_.head_dim));
    FP_CUDA(cudaMemset(partials_.get(), 0xff, partials_.bytes()));  // NaN
  }

  AttentionArgs args(Place p) {
    return {.q = q_->at(p),
            .ld_q = ld(),
            .out = out_->at(p),
            .ld_out = ld(),
            .cache = cache(p),
            .block_tables = tables_->at(p),
            .block_table_stride = table_stride_,
            .tiles = tiles_->at(p),
            .num_tiles = static_cast<int32_t>(tiles_->initial().size()),
            .rows = rows_,
            .merges = merges_.empty() ? nullptr : device_merges_->at(p),
            .num_merges = static_cast<int32_t>(merges_.size()),
            .num_blocks = 7,  // so that some take several tiles
            .partials = reinterpret_cast<float*>(partials_.get()),
            .partial_rows = partial_rows_,
            .heads = shape_.heads,
            .kv_heads = shape_.kv_heads,
            .kv_end = shape_.kv_heads,
            .head_dim = shape_.head_dim,
            .window = shape_.window,
            .softcap = shape_.softcap};
  }

  // Sums of p |v|: what an output's error is a share of.
  std::vector<double> scale() {
    keys_->host() = keys_->initial();
    q_->host() = q_->initial();
    tables_->host() = tables_->initial();
    tiles_->host() = tiles_->initial();
    out_->host() = out_->initial();
    values_->host() = values_->initial();
    for (Bf16& value : values_->host())
      value &= 0x7fff;
    fake_kernels::attention(args(Place::kHost));
    std::vector<double> out;
    for (const Bf16 value : out_->host())
      out.push_back(widen(value));
    return out;
  }

  void expect_is_plain() {
    set_tiles(attention_tiles(slices_, group()), slices_);
    out_->allow(kAllowed, 1e-6, scale());
    expect_kernel([&](cudaStream_t s) { return launch_attention(args(Place::kDevice), s); },
                  [&] { fake_kernels::attention(args(Place::kHost)); });
  }

  // The output's bits after only these slices were computed.
  std::vector<Bf16> bits_of(std::span<const AttentionSlice> slices) {
    set_tiles(attention_tiles(slices, group()), slices);
    const auto fetched =
        run([&](cudaStream_t s) { return launch_attention(args(Place::kDevice), s); });
    std::vector<Bf16> out(out_->initial().size());
    std::memcpy(out.data(), fetched[4].data(), fetched[4].size());
    return out;
  }

  Shape shape_;
  std::vector<AttentionSlice> slices_;
  int32_t rows_ = 0;
  int32_t table_stride_ = 1;
  int64_t head_stride_ = 0;
  int64_t block_stride_ = 0;
  Array<int32_t>* tables_ = nullptr;
  Array<Bf16>* q_ = nullptr;
  Array<Bf16>* keys_ = nullptr;
  Array<Bf16>* values_ = nullptr;
  Array<Bf16>* out_ = nullptr;  // the fifth operand
  Array<AttentionTile>* tiles_ = nullptr;
  std::vector<AttentionTile> merges_;
  Array<AttentionTile>* device_merges_ = nullptr;
  DeviceBuffer partials_{0};
  int32_t partial_rows_ = 0;
};

// Hopper's kernel, where the device and the build have it: against the same plain loops.
class HopperAttention : public Attention {
 protected:
  void SetUp() override {
    Attention::SetUp();
    if (!IsSkipped() && !kIsDouble && (gpu_.compute_capability != 90 || !has_hopper_attention()))
      GTEST_SKIP() << "compute capability 9.0 and a build with FlashInfer's headers are needed";
  }

  void make_rows(const Shape& shape) {
    make(shape);
    // Entries beyond a sequence's blocks are no block's number: reading a block by one fails.
    for (const AttentionSlice& slice : slices_) {
      const int32_t used = ((slice.position + slice.rows - 1) >> shape.block_shift) + 1;
      const auto table = tables_->initial().begin() + slice.sequence * table_stride_;
      std::fill(table + used, table + table_stride_, INT32_MAX);
    }
  }

  void set_row_tiles(std::span<const AttentionSlice> slices, size_t padding = 0) {
    set_tiles(attention_row_tiles(slices, shape_.head_dim), slices, padding);
  }

  AttentionArgs args_of_heads(Place p) {
    AttentionArgs out = args(p);
    out.kv_begin = kv_begin_;
    out.kv_end = kv_end_ > 0 ? kv_end_ : shape_.kv_heads;
    return out;
  }

  void expect_rows_are_plain() {
    set_tiles(attention_tiles(slices_, group()), slices_);
    out_->allow(kAllowed, 1e-6, scale());
    set_row_tiles(slices_, /*padding=*/3);
    expect_kernel(
        [&](cudaStream_t s) { return launch_attention_hopper(args_of_heads(Place::kDevice), s); },
        [&] { fake_kernels::attention_of_rows(args_of_heads(Place::kHost)); });
  }

  std::vector<Bf16> bits_of_rows(std::span<const AttentionSlice> slices) {
    set_row_tiles(slices);
    const auto fetched = run(
        [&](cudaStream_t s) { return launch_attention_hopper(args_of_heads(Place::kDevice), s); });
    std::vector<Bf16> out(out_->initial().size());
    std::memcpy(out.data(), fetched[4].data(), fetched[4].size());
    return out;
  }

  int32_t kv_begin_ = 0;
  int32_t kv_end_ = 0;
};

}  // namespace flowprefill::testing
