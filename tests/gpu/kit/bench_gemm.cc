// Section "gemm": every candidate for every product of a layer, cuBLASLt's among them, in bf16 and
// where the card multiplies it in FP8: its times include quantising the rows and scaling the sums.
// Then what cuBLASLt suggests for each product, with the time of every suggestion: whether its
// first, which is taken unmeasured, is its best.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "devices/cuda/backend/gemm_candidates.h"
#include "devices/cuda/backend/gemm_cublas_lt.h"
#include "kernel_bench.h"

namespace flowprefill {
namespace {

struct Product {
  const char* name;
  int columns, depth;
  bool is_float, adds, gated;
  bool is_fp8 = false;

  double weight_bytes() const { return (is_fp8 ? 1.0 : 2.0) * columns * depth; }
  double flops_of_row() const { return 2.0 * columns * depth; }
};
constexpr Product kQkvProduct = {"qkv", kQkv, kHidden, false, false, false};
constexpr Product kGateUp = {"gate_up", 2 * kInner, kHidden, false, false, true};
constexpr Product kProducts[] = {
    kQkvProduct,
    {"o", kHidden, kHidden, true, true, false},
    kGateUp,
    {"down", kHidden, kInner, true, true, false},
};
constexpr int kMostRows = 8192;
constexpr int kCopies = 8;  // of the weights, taking turns: 134 MB of o in FP8, more than an L2

std::vector<std::string> lt_libraries() {
  const char* set = std::getenv("LT");
  const std::string paths = set != nullptr ? set : "";
  std::vector<std::string> out;
  for (size_t at = 0; at < paths.size();) {
    const size_t end = std::min(paths.find(':', at), paths.size());
    out.push_back(paths.substr(at, end - at));
    at = end + 1;
  }
  out.push_back("libcublasLt.so.13");
  return out;
}

cudaDeviceProp card() {
  cudaDeviceProp properties = {};
  FP_CUDA(cudaGetDeviceProperties(&properties, 0));
  return properties;
}
bool has_fp8() {
  return card().major * 10 + card().minor >= 89;
}

std::string told(const GemmTiming& timing, double flops, double weight_bytes) {
  if (!timing.failure.empty())
    return timing.candidate + ": " + timing.failure;
  return timing.candidate + text(" %.1f us %.0f TF/s %.0f GB/s", timing.us, flops / timing.us / 1e6,
                                 weight_bytes / timing.us / 1e3);
}

// The memory that all products share.
struct Operands {
  DeviceBuffer weights = random_halves(size_t{kCopies} * 2 * kInner * kHidden, 0.02f, 10);
  DeviceBuffer codes = random_codes(size_t{kCopies} * 2 * kInner * kHidden, 11);
  DeviceBuffer scales = on_device(std::vector<float>(2 * kInner, 3e-4f));
  DeviceBuffer d{size_t{kMostRows} * kInner * 4};

  std::vector<GemmArgs> args_of(const Product& product, int rows, const DeviceBuffer& a) const {
    std::vector<GemmArgs> args;
    for (size_t i = 0; i < kCopies; ++i) {
      const size_t copy = i * 2 * kInner * kHidden;
      const Fp8Operands fp8 = {.b = as<E4m3>(codes) + copy, .b_scales = floats(scales)};
      args.push_back({.a = halves(a),
                      .lda = product.depth,
                      .b = product.is_fp8 ? nullptr : halves(weights) + copy,
                      .fp8 = product.is_fp8 ? fp8 : Fp8Operands{},
                      .ldb = product.depth,
                      .d = d.get(),
                      .ldd = product.gated ? product.columns / 2 : product.columns,
                      .output = product.is_float ? GemmOutput::kFloat : GemmOutput::kBf16,
                      .adds_to_d = product.adds,
                      .is_gated = product.gated,
                      .row_begin = 0,
                      .row_end = rows,
                      .columns = product.columns,
                      .depth = product.depth});
    }
    return args;
  }
};

void measure(const Product& product, const std::vector<GemmArgs>& args, const char* note,
             cudaStream_t stream) {
  std::string reason;
  const auto selector = make_selector(&reason);  // a fresh one: no choice of before counts
  const DeviceBuffer scratch(selector->scratch_bytes(args[0]));
  const auto reports = selector->measure_all(args, {scratch.get(), scratch.bytes()}, stream);
  const int rows = args[0].row_end;
  std::string line;
  for (const GemmTiming& timing : reports[0].timings) {
    line += told(timing, product.flops_of_row() * rows, product.weight_bytes());
    line += timing.candidate == reports[0].chosen ? " <- chosen\t" : "\t";
  }
  const char* in_fp8 = product.is_fp8 ? ", fp8" : "";
  say("gemm", std::string(product.name) + " x " + std::to_string(rows) + in_fp8 + note, line);
}

// The product alone: without gate; of FP8 with the rows' codes, and scales where it writes d
// itself.
GemmArgs of_library(GemmArgs args, const Operands& operands) {
  if (args.is_gated)
    args.ldd = args.columns;
  if (args.is_fp8()) {
    args.fp8.a = as<E4m3>(operands.codes);
    if (args.is_gated)
      args.output = GemmOutput::kFloat;
    else
      args.fp8.a_scales = floats(operands.scales);
  }
  args.is_gated = false;
  return args;
}

// Each suggestion for one product: its time and its algorithm.
void measure_suggestions(const CublasLt& library, const Product& product,
                         std::vector<GemmArgs> args, cudaStream_t stream) {
  const DeviceBuffer workspace(CublasLt::kWorkspaceBytes);
  const int rows = args[0].row_end;
  const std::string what = std::string(product.name) + " x " + std::to_string(rows) +
                           (product.is_fp8 ? ", fp8" : "") + ", suggestion ";
  for (size_t i = 0; i < CublasLt::kSuggestions; ++i) {
    try {
      library.prepare(args[0], i);
      size_t next = 0;
      const double us = device_us(
          [&](cudaStream_t s) {
            FP_CUDA(library.launch(args[next++ % args.size()], {workspace.get(), workspace.bytes()},
                                   s, i));
          },
          stream, 5);
      say("cublaslt", what + std::to_string(i),
          text("%.1f us %.0f GB/s\t", us, product.weight_bytes() / us / 1e3) +
              library.config(args[0], i));
    } catch (const CudaError&) {
      throw;
    } catch (const std::exception& error) {
      say("cublaslt", what + std::to_string(i), error.what());
      return;
    }
  }
}

void bench_suggestions(const Operands& operands, const DeviceBuffer& a, cudaStream_t stream) {
  std::string reason;
  const auto library = CublasLt::load(lt_libraries(), &reason);
  if (library == nullptr)
    return say("cublaslt", "not loaded", reason);
  for (const bool is_fp8 : {false, true}) {
    if (is_fp8 && !(has_fp8() && library->has_outer_scales()))
      break;
    for (const int rows : {1, 16, 64, 256, 512, 2048}) {
      for (Product product : kProducts) {
        product.is_fp8 = is_fp8;
        std::vector<GemmArgs> args = operands.args_of(product, rows, a);
        for (GemmArgs& copy : args)
          copy = of_library(copy, operands);
        measure_suggestions(*library, product, std::move(args), stream);
      }
    }
  }
}

}  // namespace

std::unique_ptr<GemmSelector> make_selector(std::string* reason) {
  const cudaDeviceProp properties = card();
  return make_gemm_selector({.compute_capability = properties.major * 10 + properties.minor,
                             .num_multiprocessors = properties.multiProcessorCount,
                             .name = properties.name},
                            {.cublas_lt_libraries = lt_libraries()}, reason);
}

void bench_gemm(cudaStream_t stream) {
  std::string reason;
  make_selector(&reason);
  say("gemm", "cublaslt", reason.empty() ? "loaded" : "not loaded: " + reason);
  const Operands operands;
  const DeviceBuffer noise = random_halves(size_t{kMostRows} * kInner, 1, 9);
  for (const bool is_fp8 : {false, true}) {
    if (is_fp8 && !has_fp8()) {
      say("gemm", "fp8", "left out: multiplied from compute capability 8.9 on");
      break;
    }
    for (const int rows : {4096, 1024, 256, 1, 64, 2048, 512, kMostRows, 16}) {
      for (Product product : kProducts) {
        product.is_fp8 = is_fp8;
        measure(product, operands.args_of(product, rows, noise), "", stream);
      }
    }
  }
  // Zeros switch no wires and so take less power: how much faster they are.
  const DeviceBuffer zeros(size_t{4096} * kHidden * 2);
  for (const Product& product : {kQkvProduct, kGateUp})
    measure(product, operands.args_of(product, 4096, zeros), " on zeros", stream);
  bench_suggestions(operands, noise, stream);
}

}  // namespace flowprefill
