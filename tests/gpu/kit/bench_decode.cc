// Section "decode_layer": 32 layers of a step that decodes, nine kernels each, in a captured graph:
// time of a layer without and with launches that overlap (overlap_launches()), and with these where
// products have their norms and ropes fused, in turns, and whether all give the same bits.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "decode_step.h"
#include "devices/cuda/runtime/graph.h"
#include "devices/cuda/runtime/stream.h"

namespace flowprefill {
namespace {

constexpr int kReplays = 4;  // between two events
constexpr int kChecks = 24;  // batches whose results are compared

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
