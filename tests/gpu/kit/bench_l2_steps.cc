// Section "l2_steps": whether products of few rows gain where lines of weights that have no room in
// shared memory are on their way to the L2 cache when the kernel before ends (GemmArgs::l2_steps):
// each product behind a small kernel, then layers that decode. And what it costs layers that a
// launch of Hopper's attention finds nothing to do.
#include <memory>
#include <stdexcept>

#include "decode_step.h"
#include "devices/cuda/runtime/graph.h"
#include "devices/cuda/runtime/stream.h"

namespace flowprefill {
namespace {

constexpr const char* kSection = "l2_steps";
constexpr int kProducts = 16;  // in a graph

// Captured now, replayed by each launch.
Launch graph_of(const Launch& launches) {
  const Stream capturing = Stream::make();
  const Graph graph = capture(capturing.get(), launches, {});
  const auto exec = std::make_shared<GraphExec>(graph, capturing.get(), CallContext{});
  capturing.synchronize();
  return [exec](cudaStream_t stream) { exec->launch(stream, {}); };
}

struct Product {
  const char* name;
  int columns, depth;
  bool adds;
};
constexpr Product kOfLayer[] = {{"qkv", kQkv, kHidden, false},
                                {"o", kHidden, kHidden, true},
                                {"gate and up", 2 * kInner, kHidden, false},
                                {"down", kHidden, kInner, true}};

// A product behind the norm of a row, again and again; weights come from memory, not from cache.
void bench_product(const Product& of, int rows, const DeviceBuffer& weights, cudaStream_t stream) {
  const DeviceBuffer hidden(kHidden * 4), scales(kHidden * 4), normed(kHidden * 2);
  const auto many = static_cast<size_t>(rows);
  const DeviceBuffer a = random_halves(many * static_cast<size_t>(of.depth), 1, 3);
  const DeviceBuffer d(many * static_cast<size_t>(of.columns) * 4);
  std::vector<Variant> variants;
  for (const int32_t steps : {0, 4, 8}) {
    const Launch launches = [&, steps](cudaStream_t s) {
      GemmArgs args = product_args(a, of.depth, weights, of.columns, d, rows, of.adds);
      args.l2_steps = steps;
      for (int i = 0; i < kProducts; ++i) {
        args.b = halves(weights) + int64_t{i % kCopies} * of.columns * of.depth;
        FP_CUDA(launch_rms_norm(norm_args(hidden, scales, normed, 1), s));
        FP_CUDA(launch_gemm(args, GemmTile::kFewRows, s));
      }
    };
    variants.push_back({std::to_string(steps) + " steps", graph_of(launches)});
  }
  compare(kSection, std::string(of.name) + " x " + std::to_string(rows) + ", 16 behind norms",
          variants, 7, stream);
}

void bench_layers(int rows, cudaStream_t stream) {
  struct Form {
    const char* name;
    L2Steps steps;
    bool has_empty_hopper = false;
  };
  std::vector<Form> forms = {{"none", {}},
                             {"o 4", {.o = 4}},
                             {"o 8", {.o = 8}},
                             {"qkv 4", {.qkv = 4}},
                             {"gate and up 4", {.gate_up = 4}},
                             {"down 4", {.down = 4}},
                             {"all 4", {4, 4, 4, 4}},
                             {"all 8", {8, 8, 8, 8}}};
  if (has_hopper_attention())
    forms.push_back({"none, an empty launch of Hopper's attention", {}, true});
  DecodeStep step(rows);
  std::vector<Variant> variants;
  for (const Form& form : forms) {
    const DecodeForm how{
        .fuses = true, .l2_steps = form.steps, .has_empty_hopper = form.has_empty_hopper};
    variants.push_back({form.name, graph_of([&](cudaStream_t s) { step.launch(s, how); })});
  }
  std::vector<std::byte> expected;
  for (const Variant& variant : variants) {
    step.upload_tokens(1, stream);
    variant.launch(stream);
    const std::vector<std::byte> found = step.results(stream);
    if (expected.empty())
      expected = found;
    if (found != expected)
      throw std::runtime_error(std::string(kSection) + ": other bits: " + variant.name);
  }
  compare(kSection, "batch " + std::to_string(rows) + ", 32 layers", variants, 7, stream);
}

}  // namespace

void bench_l2_steps(cudaStream_t stream) {
  for (const int rows : {1, 4, 16})
    bench_layers(rows, stream);
  const DeviceBuffer weights = random_halves(size_t{kCopies} * 2 * kInner * kHidden, 0.02f, 12);
  for (const Product& of : kOfLayer) {
    for (const int rows : {1, 4, 16})
      bench_product(of, rows, weights, stream);
  }
}

}  // namespace flowprefill
