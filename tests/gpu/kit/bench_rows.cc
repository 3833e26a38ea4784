// Section "rows": the kernels that read and write rows once, and sampling.
#include <numeric>
#include <random>
#include <utility>

#include "kernel_bench.h"

namespace flowprefill {
namespace {

void bench_layer_rows(cudaStream_t stream) {
  DeviceBuffer hidden(size_t{kRows} * kHidden * 4), weight(kHidden * 4),
      rotary(size_t{kRows} * kDim * 4);
  const DeviceBuffer qkv = random_halves(size_t{kRows} * kQkv, 1, 5),
                     gate_up = random_halves(size_t{kRows} * 2 * kInner, 1, 6);
  DeviceBuffer normed(size_t{kRows} * kHidden * 2), q(size_t{kRows} * kHeads * kDim * 2),
      gated(size_t{kRows} * kInner * 2);
  DeviceBuffer cache(size_t{kRows} * 2 * kKv * kDim * 2);
  std::vector<int32_t> up(kRows), table(kRows / kBlockTokens);
  std::iota(up.begin(), up.end(), 0);
  std::iota(table.begin(), table.end(), 0);
  const DeviceBuffer sequences = on_device(std::vector<int32_t>(kRows, 1));
  const DeviceBuffer positions = on_device(up), tables = on_device(table);
  const auto told = [&](const char* what, double bytes, const Launch& launch) {
    const double us = device_us(launch, stream);
    say("rows", what, text("%.1f us\t%.0f GB/s", us, bytes / us / 1e3));
  };
  told("rms_norm 4096 x 4096", 1.0 * kRows * kHidden * 6, [&](cudaStream_t s) {
    FP_CUDA(launch_rms_norm(norm_args(hidden, weight, normed, kRows), s));
  });
  told("gate 4096 x 14336", 1.0 * kRows * kInner * 6, [&](cudaStream_t s) {
    FP_CUDA(launch_gate(GateArgs<Bf16>{.in = halves(gate_up),
                                       .ld_in = 2 * kInner,
                                       .out = halves(gated),
                                       .ld_out = kInner,
                                       .rows = kRows,
                                       .width = kInner},
                        s));
  });
  const BatchView batch{.sequences = as<int32_t>(sequences),
                        .positions = as<int32_t>(positions),
                        .block_tables = as<int32_t>(tables),
                        .block_table_stride = kRows / kBlockTokens};
  const RopeArgs<Bf16> rope = rope_args(batch, qkv, rotary, q, cache, kRows);
  told("rope 4096 rows", 1.0 * kRows * (kQkv * 4 + kDim * 4),
       [&](cudaStream_t s) { FP_CUDA(launch_rope(rope, s)); });
}

// What stands around a product in FP8.
void bench_fp8_rows(cudaStream_t stream) {
  const DeviceBuffer in = random_halves(size_t{kRows} * kInner, 1, 7);
  const DeviceBuffer codes(size_t{kRows} * kInner), sums(size_t{kRows} * 2 * kInner * 4),
      scales(size_t{2} * kInner * 4), out(size_t{kRows} * kInner * 4);
  for (const int width : {kHidden, kInner}) {
    const double us = device_us(
        [&](cudaStream_t s) {
          FP_CUDA(launch_quantise({.in = halves(in),
                                   .ld_in = width,
                                   .out = as<E4m3>(codes),
                                   .ld_out = width,
                                   .scales = floats(scales),
                                   .rows = kRows,
                                   .width = width},
                                  s));
        },
        stream);
    say("rows", "quantise 4096 x " + std::to_string(width),
        text("%.1f us\t%.0f GB/s", us, 3.0 * kRows * width / us / 1e3));
  }
  for (const bool is_gated : {false, true}) {
    const int columns = is_gated ? 2 * kInner : kHidden;
    const int width = is_gated ? kInner : kHidden;
    const double us = device_us(
        [&](cudaStream_t s) {
          FP_CUDA(launch_rescale({.in = floats(sums),
                                  .ld_in = columns,
                                  .row_scales = floats(scales),
                                  .column_scales = floats(scales),
                                  .out = out.get(),
                                  .ld_out = width,
                                  .output = is_gated ? GemmOutput::kBf16 : GemmOutput::kFloat,
                                  .adds_to_out = !is_gated,
                                  .is_gated = is_gated,
                                  .rows = kRows,
                                  .columns = columns},
                                 s));
        },
        stream);
    const double bytes = 4.0 * columns + (is_gated ? 2.0 : 8.0) * width;
    say("rows",
        std::string("rescale 4096 x ") + std::to_string(columns) + (is_gated ? ", gate" : ", add"),
        text("%.1f us\t%.0f GB/s", us, bytes * kRows / us / 1e3));
  }
}

// Logits as a wide nucleus has them: some 25,000 tokens make up 95 %.
void bench_sampling(cudaStream_t stream) {
  constexpr int kMost = 256;
  DeviceBuffer logits(size_t{kVocab} * 4 * kMost), tokens(kMost * 4);
  std::vector<float> random(kVocab);
  std::mt19937 engine(3);
  std::normal_distribution<float> normal;
  for (float& value : random)
    value = 2 * normal(engine);
  for (int i = 0; i < kMost; ++i)
    FP_CUDA(cudaMemcpy(logits.get() + size_t{kVocab} * 4 * static_cast<size_t>(i), random.data(),
                       kVocab * 4, cudaMemcpyHostToDevice));
  const std::pair<const char*, SamplingParams> cases[] = {
      {"greedy", {}},
      {"temperature", {.temperature = 0.8f, .uniform = 0.5f}},
      {"min_p 0.05", {.temperature = 0.8f, .min_p = 0.05f, .uniform = 0.5f}},
      {"top_k 50, top_p 0.95", {.temperature = 0.8f, .top_k = 50, .top_p = 0.95f, .uniform = 0.5f}},
      {"top_k 50, top_p 0.95, min_p 0.05",
       {.temperature = 0.8f, .top_k = 50, .top_p = 0.95f, .min_p = 0.05f, .uniform = 0.5f}},
      {"top_k 5000", {.temperature = 0.8f, .top_k = 5000, .uniform = 0.5f}},
      {"top_p 0.95", {.temperature = 0.8f, .top_p = 0.95f, .uniform = 0.5f}},
      {"top_p 0.7, nearly even", {.temperature = 1000, .top_p = 0.7f, .uniform = 0.5f}}};
  for (const auto& [what, one] : cases) {
    const DeviceBuffer params = on_device(std::vector<SamplingParams>(kMost, one));
    for (const int n : {1, 32, 64, kMost}) {
      const double us = device_us(
          [&](cudaStream_t s) {
            FP_CUDA(launch_sample({.logits = floats(logits),
                                   .ld_logits = kVocab,
                                   .params = as<const SamplingParams>(params),
                                   .out = as<int32_t>(tokens),
                                   .rows = n,
                                   .width = kVocab},
                                  s));
          },
          stream);
      say("rows", std::string("sample ") + what + ", rows " + std::to_string(n),
          text("%.1f us", us));
    }
  }
}

}  // namespace

void bench_rows(cudaStream_t stream) {
  bench_layer_rows(stream);
  bench_fp8_rows(stream);
  bench_sampling(stream);
}

}  // namespace flowprefill
