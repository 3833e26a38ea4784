// Section "decode_layer": 32 layers of a step that decodes, nine kernels each, in a captured graph:
// time of a layer without and with launches that overlap (overlap_launches()), and with these where
// products have their norms and ropes fused, in turns, and whether all give the same bits.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
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
    const GemmArgs args = product_args(a, depth, b, kHidden, hidden_, rows_, true);
    FP_CUDA(launch_gemm(args, GemmTile::kFewRows, stream));
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

// Launches of a step; fuses: as DecodeStep::launch().
using Launches = std::function<void(cudaStream_t, bool fuses)>;

// The same step as a graph: launches apart, overlapped, and overlapped with norms and ropes fused.
struct Graphs {
  static constexpr std::array<const char*, 3> kNames = {"apart", "overlapped", "fused"};
  std::array<GraphExec, 3> execs;

  explicit Graphs(const Launches& launches)
      : execs{make(launches, false, false), make(launches, true, false),
              make(launches, true, true)} {}

 private:
  static GraphExec make(const Launches& launches, bool overlaps, bool fuses) {
    const Overlap setting(overlaps);
    const Stream capturing = Stream::make();
    const Graph graph = capture(capturing.get(), [&](cudaStream_t s) { launches(s, fuses); }, {});
    GraphExec exec(graph, capturing.get(), {});
    capturing.synchronize();
    return exec;
  }
};

// In turns; us of one of `parts`.
void compare_times(const std::string& what, const Graphs& graphs, int parts, double bytes,
                   cudaStream_t stream) {
  std::array<std::vector<double>, 3> us;
  for (int round = 0; round < 7; ++round) {
    for (size_t i = 0; i < us.size(); ++i) {
      const Launch launch = [&](cudaStream_t s) {
        for (int replay = 0; replay < kReplays; ++replay)
          graphs.execs[i].launch(s, {});
      };
      us[i].push_back(device_us(launch, stream, 1) / kReplays / parts);
    }
  }
  std::string line;
  for (size_t i = 0; i < us.size(); ++i) {
    const double middle = median(us[i]);
    line += std::string(i == 0 ? "" : "\t") + text("%.2f us ", middle) + Graphs::kNames[i];
    if (bytes > 0)
      line += text(" (%.0f GB/s)", bytes / middle / 1e3);
  }
  say("decode_layer", what, line);
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

// Launches apart as a graph against each other graph several times in a row, and without a graph,
// on the same tokens.
void compare_bits(DecodeStep* step, const Graphs& graphs, cudaStream_t stream) {
  size_t of_graph = 0, of_eager = 0, of_itself = 0, batches = 0;
  const Overlap setting(true);
  const auto run = [&](unsigned seed, const Launch& launch) {
    step->upload_tokens(seed, stream);
    launch(stream);
    return step->results(stream);
  };
  const auto replay = [&](size_t graph, int times) -> Launch {
    return [&graphs, graph, times](cudaStream_t s) {
      for (int i = 0; i < times; ++i)
        graphs.execs[graph].launch(s, {});
    };
  };
  for (unsigned seed = 0; seed < kChecks; ++seed) {
    const std::vector<std::byte> expected = run(seed, replay(0, 1));
    expect_numbers(expected, step->rows());
    // Leaves other numbers everywhere.
    of_itself += differing(expected, run(seed + 1000, replay(1, 1))) == 0 ? 1 : 0;
    size_t found = 0;
    for (const size_t graph : {size_t{1}, size_t{2}}) {
      found += differing(expected, run(seed, replay(graph, 3)));
      run(seed + 1000, replay(0, 1));
    }
    of_graph += found;
    for (const bool fuses : {false, true}) {
      const size_t eager =
          differing(expected, run(seed, [&](cudaStream_t s) { step->launch(s, fuses); }));
      of_eager += eager;
      found += eager;
      run(seed + 1000, replay(0, 1));
    }
    batches += found > 0 ? 1 : 0;
  }
  const std::string counts = std::to_string(of_graph) + " bytes of the graphs, " +
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
  const Graphs graphs([&](cudaStream_t s, bool fuses) { step.launch(s, fuses); });
  const std::string what = "batch " + std::to_string(rows) + ", context 1k, a layer";
  compare_times(what, graphs, kLayers, step.layer_bytes(), stream);
  compare_bits(&step, graphs, stream);
}

// What a small kernel costs in a graph, and a product after a product.
void bench_chains(cudaStream_t stream) {
  constexpr int kSmall = 100, kProducts = 32;
  const DeviceBuffer hidden(kHidden * 4), weight(kHidden * 4), a(kHidden * 2), out(kHidden * 4);
  FP_CUDA(cudaMemset(hidden.get(), 0, hidden.bytes()));
  FP_CUDA(cudaMemset(a.get(), 0, a.bytes()));
  const Graphs small([&](cudaStream_t s, bool) {
    for (int i = 0; i < kSmall; ++i)
      FP_CUDA(launch_rms_norm(norm_args(hidden, weight, a, 1), s));
  });
  compare_times("norm of a row", small, kSmall, 0, stream);
  const DeviceBuffer b = random_halves(size_t{8} * kHidden * kHidden, 0.02f, 12);
  const Graphs products([&](cudaStream_t s, bool) {
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
  for (const int rows : {1, 2, 16})
    bench_step(rows, stream);
}

}  // namespace flowprefill
