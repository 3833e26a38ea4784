// DecodeStep: 32 layers of Llama-3.1-8B on a batch that decodes, as kernels one after another. Used
// by the section "decode_layer" of kernel_bench.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "devices/cuda/kernels/attention_split.h"
#include "kernel_bench.h"

namespace flowprefill {

constexpr int kLayers = 32;
constexpr int kCopies = 4;  // of a layer's weights and cache, taking turns: 436 MB each
constexpr int kContext = 1024;
constexpr int kBlocks = kContext / kBlockTokens;  // of a sequence
constexpr int kGroup = kHeads / kKv;
constexpr int kTokens = 1024;  // of the table that rows start from

struct Layer {
  explicit Layer(unsigned seed, int rows)
      : qkv(random_halves(size_t{kQkv} * kHidden, 0.02f, seed)),
        o(random_halves(size_t{kHidden} * kHidden, 0.02f, seed + 1)),
        gate_up(random_halves(size_t{2} * kInner * kHidden, 0.02f, seed + 2)),
        down(random_halves(size_t{kHidden} * kInner, 0.02f, seed + 3)),
        cache(random_halves(size_t(rows) * kContext * 2 * kKv * kDim, 1, seed + 4)) {}

  DeviceBuffer qkv, o, gate_up, down, cache;
};

// One step of `rows` sequences, each with one new token at the end of kContext.
class DecodeStep {
 public:
  explicit DecodeStep(int rows) : rows_(rows) {
    for (int i = 0; i < kCopies; ++i)
      layers_.emplace_back(100 + 10 * static_cast<unsigned>(i), rows);
    const auto n = static_cast<size_t>(rows);
    std::vector<int32_t> sequences(n), table(n * kBlocks);
    std::iota(sequences.begin(), sequences.end(), 1);
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(5));
    sequences_ = on_device(sequences);
    table_ = on_device(table);
    positions_ = on_device(std::vector<int32_t>(n, kContext - 1));
    weight_ = on_device(std::vector<float>(kHidden, 1.0f));
    std::vector<double> turns(kDim / 2);
    for (size_t i = 0; i < turns.size(); ++i)
      turns[i] = std::pow(5e5, -2.0 * static_cast<double>(i) / kDim) / 6.283185307179586;
    turns_ = on_device(turns);
    make_tiles();
  }

  // Every run starts from the embeddings of other tokens, so that nothing stays from the last one.
  void upload_tokens(unsigned seed, cudaStream_t stream) {
    std::vector<int32_t> tokens(static_cast<size_t>(rows_));
    std::mt19937 random(seed);
    for (int32_t& token : tokens)
      token = static_cast<int32_t>(random() % kTokens);
    FP_CUDA(cudaMemcpyAsync(tokens_.get(), tokens.data(), tokens.size() * 4, cudaMemcpyHostToDevice,
                            stream));
    FP_CUDA(cudaStreamSynchronize(stream));
  }

  // fuses: norms and rope with the products, where those take them.
  void launch(cudaStream_t stream, bool fuses) const {
    FP_CUDA(launch_embed({.batch = batch(),
                          .table = halves(embeddings_),
                          .ld_table = kHidden,
                          .hidden = floats(hidden_),
                          .ld_hidden = kHidden,
                          .rows = rows_,
                          .width = kHidden},
                         stream));
    FP_CUDA(launch_rotary({.batch = batch(),
                           .turns_per_position = as<const double>(turns_),
                           .scale = 1,
                           .rotary = floats(rotary_),
                           .rows = rows_,
                           .turning = kDim},
                          stream));
    for (int i = 0; i < kLayers; ++i)
      launch_layer(layers_[static_cast<size_t>(i % kCopies)], fuses, stream);
  }

  // The residual stream after the last layer, then what else the last layer left.
  std::vector<std::byte> results(cudaStream_t stream) const {
    std::vector<std::byte> out;
    for (const DeviceBuffer* buffer :
         {&hidden_, &q_, &attended_, &gated_, &layers_[(kLayers - 1) % kCopies].cache})
      append(buffer->get(), buffer->bytes(), &out, stream);
    return out;
  }

  int rows() const { return rows_; }
  // Read from memory in a layer: weights, and keys and values.
  double layer_bytes() const {
    return 2.0 * (kQkv + kHidden + 3.0 * kInner) * kHidden + 4.0 * rows_ * kContext * kKv * kDim;
  }

 private:
  static void append(const std::byte* from, size_t bytes, std::vector<std::byte>* out,
                     cudaStream_t stream) {
    out->resize(out->size() + bytes);
    FP_CUDA(cudaMemcpyAsync(out->data() + out->size() - bytes, from, bytes, cudaMemcpyDeviceToHost,
                            stream));
    FP_CUDA(cudaStreamSynchronize(stream));
  }

  // As the CUDA backend cuts the keys of such a batch.
  void make_tiles() {
    const AttentionSplit split{multiprocessors(), kGroup, kKv};
    std::vector<AttentionSlice> slices;
    int64_t partial_rows = 0;
    for (int i = 0; i < rows_; ++i) {
      slices.push_back({.row = i,
                        .rows = 1,
                        .position = kContext - 1,
                        .sequence = i,
                        .chunk_keys = split.chunk_keys(1, kContext),
                        .is_decode = split.is_decode(1)});
      partial_rows += partial_rows_of(slices.back(), kGroup);
    }
    const std::vector<AttentionTile> tiles = attention_tiles(slices, kGroup);
    const std::vector<AttentionTile> merges = attention_merges(tiles);
    tiles_ = on_device(tiles);
    merges_ = on_device(merges);
    partials_ = DeviceBuffer(attention_partial_bytes(partial_rows, kKv, kDim));
    const int units = multiprocessors() * AttentionSplit::kBlocksPerUnit;
    attention_ = {.q = halves(q_),
                  .ld_q = kHeads * kDim,
                  .out = halves(attended_),
                  .ld_out = kHeads * kDim,
                  .block_tables = as<const int32_t>(table_),
                  .block_table_stride = kBlocks,
                  .tiles = as<const AttentionTile>(tiles_),
                  .num_tiles = static_cast<int32_t>(tiles.size()),
                  .merges = as<const AttentionTile>(merges_),
                  .num_merges = static_cast<int32_t>(merges.size()),
                  .num_blocks = std::min(static_cast<int32_t>(tiles.size()),
                                         std::max(rows_, (units + kKv - 1) / kKv)),
                  .partials = floats(partials_),
                  .partial_rows = static_cast<int32_t>(partial_rows),
                  .heads = kHeads,
                  .kv_heads = kKv,
                  .kv_end = kKv,
                  .head_dim = kDim};
  }

  BatchView batch() const {
    return {.tokens = as<const int32_t>(tokens_),
            .sequences = as<const int32_t>(sequences_),
            .positions = as<const int32_t>(positions_),
            .block_tables = as<const int32_t>(table_),
            .block_table_stride = kBlocks};
  }

  // Of the norms of the residual stream; to_turn: whose keys and values the columns are, else gate
  // and up.
  void product(const DeviceBuffer& b, int columns, const DeviceBuffer& d, const Layer* to_turn,
               bool fuses, cudaStream_t stream) const {
    FusedProduct fused{product_args(normed_, kHidden, b, columns, d, rows_, false)};
    if (to_turn == nullptr) {
      fused.product.is_gated = true;
      fused.product.ldd = columns / 2;
    }
    const RmsNormArgs<Bf16> norm = norm_args(hidden_, weight_, normed_, rows_);
    const RopeArgs<Bf16> rope = to_turn == nullptr
                                    ? RopeArgs<Bf16>{}
                                    : rope_args(batch(), qkv_, rotary_, q_, to_turn->cache, rows_);
    if (fuses && can_fuse_norm(fused.product))
      fused.norm = {norm.hidden, norm.ld_hidden, norm.weight, norm.eps};
    else
      FP_CUDA(launch_rms_norm(norm, stream));
    if (fuses && to_turn != nullptr && can_fuse_rope(fused.product, rope))
      fused.rope = rope;
    if (fused.has_norm() || fused.has_rope())
      FP_CUDA(launch_fused(fused, stream));
    else
      FP_CUDA(launch_gemm(fused.product, GemmTile::kFewRows, stream));
    if (to_turn != nullptr && !fused.has_rope())
      FP_CUDA(launch_rope(rope, stream));
  }

  // Added to the residual stream.
  void add_product(const DeviceBuffer& a, int depth, const DeviceBuffer& b,
                   cudaStream_t stream) const {
    FP_CUDA(launch_gemm(product_args(a, depth, b, kHidden, hidden_, rows_, true),
                        GemmTile::kFewRows, stream));
  }

  void launch_layer(const Layer& layer, bool fuses, cudaStream_t stream) const {
    product(layer.qkv, kQkv, qkv_, &layer, fuses, stream);
    AttentionArgs attention = attention_;
    attention.cache = cache_of(layer.cache);
    FP_CUDA(launch_attention(attention, stream));
    add_product(attended_, kHeads * kDim, layer.o, stream);
    product(layer.gate_up, 2 * kInner, gated_, nullptr, fuses, stream);
    add_product(gated_, kInner, layer.down, stream);
  }

  int32_t rows_;
  std::vector<Layer> layers_;
  const DeviceBuffer embeddings_ = random_halves(size_t{kTokens} * kHidden, 1, 99);
  DeviceBuffer tokens_{of_rows(1, 4)}, hidden_{of_rows(kHidden, 4)}, normed_{of_rows(kHidden, 2)},
      qkv_{of_rows(kQkv, 2)}, rotary_{of_rows(kDim, 4)}, q_{of_rows(kHeads * kDim, 2)},
      attended_{of_rows(kHeads * kDim, 2)}, gated_{of_rows(kInner, 2)};
  DeviceBuffer sequences_{0}, positions_{0}, table_{0}, weight_{0}, turns_{0}, tiles_{0},
      merges_{0}, partials_{0};
  AttentionArgs attention_;

  size_t of_rows(int columns, size_t bytes) const {
    return static_cast<size_t>(rows_) * static_cast<size_t>(columns) * bytes;
  }
};

}  // namespace flowprefill
