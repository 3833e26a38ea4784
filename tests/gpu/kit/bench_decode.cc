// Section "decode_layer": 32 layers of a step that decodes, nine kernels each, in a captured graph:
// time of a layer without and with launches that overlap (overlap_launches()), in turns, and
// whether both give the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>

#include "devices/cuda/kernels/attention_split.h"
#include "devices/cuda/runtime/graph.h"
#include "devices/cuda/runtime/stream.h"
#include "kernel_bench.h"

namespace flowprefill {
namespace {

constexpr int kLayers = 32;
constexpr int kCopies = 4;  // of a layer's weights and cache, taking turns: 436 MB each
constexpr int kContext = 1024;
constexpr int kBlocks = kContext / kBlockTokens;  // of a sequence
constexpr int kGroup = kHeads / kKv;
constexpr int kTokens = 1024;  // of the table that rows start from
constexpr int kReplays = 4;    // between two events
constexpr int kChecks = 24;    // batches whose results are compared

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

  void launch(cudaStream_t stream) const {
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
      launch_layer(layers_[static_cast<size_t>(i % kCopies)], stream);
  }

  // The residual stream after the last layer, then what else the last layer left.
  std::vector<std::byte> results(cudaStream_t stream) const {
    std::vector<std::byte> out;
    for (const DeviceBuffer* buffer : {&hidden_, &qkv_, &q_, &attended_, &normed_, &gated_})
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
    cudaDeviceProp card = {};
    FP_CUDA(cudaGetDeviceProperties(&card, 0));
    const AttentionSplit split{card.multiProcessorCount, kGroup, kKv};
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
    const int units = card.multiProcessorCount * AttentionSplit::kBlocksPerUnit;
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

  void norm(cudaStream_t stream) const {
    FP_CUDA(launch_rms_norm(norm_args(hidden_, weight_, normed_, rows_), stream));
  }

  void rope(const Layer& layer, cudaStream_t stream) const {
    FP_CUDA(launch_rope(rope_args(batch(), qkv_, rotary_, q_, layer.cache, rows_), stream));
  }

  // Adds to the residual stream where `d` is that one.
  void product(const DeviceBuffer& a, int depth, const DeviceBuffer& b, int columns,
               const DeviceBuffer& d, bool is_gated, cudaStream_t stream) const {
    GemmArgs args = product_args(a, depth, b, columns, d, rows_, &d == &hidden_);
    if (is_gated) {
      args.is_gated = true;
      args.ldd = columns / 2;
    }
    FP_CUDA(launch_gemm(args, GemmTile::kFewRows, stream));
  }

  void launch_layer(const Layer& layer, cudaStream_t stream) const {
    norm(stream);
    product(normed_, kHidden, layer.qkv, kQkv, qkv_, false, stream);
    rope(layer, stream);
    AttentionArgs attention = attention_;
    attention.cache = cache_of(layer.cache);
    FP_CUDA(launch_attention(attention, stream));
    product(attended_, kHeads * kDim, layer.o, kHidden, hidden_, false, stream);
    norm(stream);
    product(normed_, kHidden, layer.gate_up, 2 * kInner, gated_, true, stream);
    product(gated_, kInner, layer.down, kHidden, hidden_, false, stream);
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

// What was switched before is again when this goes.
class Overlap {
 public:
  explicit Overlap(bool on) : before_(overlap_launches(on)) {}
  ~Overlap() { overlap_launches(before_); }
  Overlap(const Overlap&) = delete;
  Overlap& operator=(const Overlap&) = delete;

 private:
  bool before_;
};

// The same launches twice as a graph.
struct Pair {
  GraphExec apart, overlapped;

  explicit Pair(const Launch& launch)
      : apart(make(launch, false)), overlapped(make(launch, true)) {}

 private:
  static GraphExec make(const Launch& launch, bool overlaps) {
    const Overlap setting(overlaps);
    const Stream capturing = Stream::make();
    const Graph graph = capture(capturing.get(), launch, {});
    GraphExec exec(graph, capturing.get(), {});
    capturing.synchronize();
    return exec;
  }
};

// In turns; us of one of `parts`.
void compare_times(const std::string& what, const Pair& pair, int parts, double bytes,
                   cudaStream_t stream) {
  std::vector<double> us[2];
  for (int round = 0; round < 7; ++round) {
    for (const bool overlaps : {false, true}) {
      const GraphExec& exec = overlaps ? pair.overlapped : pair.apart;
      const Launch launch = [&](cudaStream_t s) {
        for (int i = 0; i < kReplays; ++i)
          exec.launch(s, {});
      };
      us[overlaps].push_back(device_us(launch, stream, 1) / kReplays / parts);
    }
  }
  const double apart = median(us[0]), overlapped = median(us[1]);
  std::string line = text("%.2f us apart\t%.2f us overlapped\t%+.1f %%", apart, overlapped,
                          100 * (overlapped / apart - 1));
  if (bytes > 0)
    line += text("\t%.0f, %.0f GB/s", bytes / apart / 1e3, bytes / overlapped / 1e3);
  const auto [least, most] = std::minmax_element(us[1].begin(), us[1].end());
  say("decode_layer", what, line + text("\toverlapped from %.2f to %.2f", *least, *most));
}

size_t differing(const std::vector<std::byte>& a, const std::vector<std::byte>& b) {
  size_t count = 0;
  for (size_t i = 0; i < a.size(); ++i)
    count += a[i] != b[i] ? 1 : 0;
  return count;
}

// Throws where an element is no number or all are zero: then equal bits would say nothing.
void expect_numbers(const std::vector<std::byte>& results, int rows) {
  std::vector<float> hidden(static_cast<size_t>(rows) * kHidden);
  std::memcpy(hidden.data(), results.data(), hidden.size() * sizeof(float));
  double sum = 0;
  for (const float value : hidden)
    sum += std::abs(value);
  if (!std::isfinite(sum) || sum == 0)
    throw std::runtime_error("decode_layer: mean of the residual stream: got " +
                             std::to_string(sum / static_cast<double>(hidden.size())));
}

// Launches apart as a graph, overlapped as a graph several times in a row, and overlapped without a
// graph, on the same tokens.
void compare_bits(DecodeStep* step, const Pair& pair, cudaStream_t stream) {
  size_t of_graph = 0, of_eager = 0, of_itself = 0, batches = 0;
  const Overlap setting(true);
  for (unsigned seed = 0; seed < kChecks; ++seed) {
    step->upload_tokens(seed, stream);
    pair.apart.launch(stream, {});
    const std::vector<std::byte> expected = step->results(stream);
    expect_numbers(expected, step->rows());
    step->upload_tokens(seed + 1000, stream);
    pair.overlapped.launch(stream, {});  // leaves other numbers everywhere
    of_itself += differing(expected, step->results(stream)) == 0 ? 1 : 0;
    step->upload_tokens(seed, stream);
    for (int i = 0; i < 3; ++i)
      pair.overlapped.launch(stream, {});
    const size_t graph = differing(expected, step->results(stream));
    step->upload_tokens(seed + 1000, stream);
    pair.apart.launch(stream, {});
    step->upload_tokens(seed, stream);
    step->launch(stream);
    const size_t eager = differing(expected, step->results(stream));
    of_graph += graph;
    of_eager += eager;
    batches += graph + eager > 0 ? 1 : 0;
  }
  const std::string counts = std::to_string(of_graph) + " bytes of the graph, " +
                             std::to_string(of_eager) + " of eager launches differ, in " +
                             std::to_string(batches) + " of " + std::to_string(kChecks) +
                             " batches; other tokens gave the same bits " +
                             std::to_string(of_itself) + " times";
  say("decode_layer", "batch " + std::to_string(step->rows()) + ", bits", counts);
  if (of_graph + of_eager + of_itself > 0)
    throw std::runtime_error("overlapped launches change results: " + counts);
}

void bench_step(int rows, cudaStream_t stream) {
  DecodeStep step(rows);
  step.upload_tokens(1, stream);
  const Pair pair([&](cudaStream_t s) { step.launch(s); });
  const std::string what = "batch " + std::to_string(rows) + ", context 1k, a layer";
  compare_times(what, pair, kLayers, step.layer_bytes(), stream);
  compare_bits(&step, pair, stream);
}

// What a small kernel costs in a graph, and a product after a product.
void bench_chains(cudaStream_t stream) {
  constexpr int kSmall = 100, kProducts = 32;
  const DeviceBuffer hidden(kHidden * 4), weight(kHidden * 4), a(kHidden * 2), out(kHidden * 4);
  FP_CUDA(cudaMemset(hidden.get(), 0, hidden.bytes()));
  FP_CUDA(cudaMemset(a.get(), 0, a.bytes()));
  const Pair small([&](cudaStream_t s) {
    for (int i = 0; i < kSmall; ++i)
      FP_CUDA(launch_rms_norm(norm_args(hidden, weight, a, 1), s));
  });
  compare_times("norm of a row", small, kSmall, 0, stream);
  const DeviceBuffer b = random_halves(size_t{8} * kHidden * kHidden, 0.02f, 12);
  const Pair products([&](cudaStream_t s) {
    GemmArgs args = product_args(a, kHidden, b, kHidden, out, 1, true);
    for (size_t i = 0; i < kProducts; ++i) {
      args.b = halves(b) + i % 8 * kHidden * kHidden;
      FP_CUDA(launch_gemm(args, GemmTile::kFewRows, s));
    }
  });
  compare_times("o x 1 after o x 1", products, kProducts, 2.0 * kHidden * kHidden, stream);
}

}  // namespace

void bench_decode(cudaStream_t stream) {
  {
    const Overlap setting(true);
    say("decode_layer", "launches overlap on this device", overlaps_launches() ? "yes" : "no");
  }
  bench_chains(stream);
  for (const int rows : {1, 16})
    bench_step(rows, stream);
}

}  // namespace flowprefill
