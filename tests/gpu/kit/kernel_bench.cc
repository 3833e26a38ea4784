// Times the CUDA kernels on the shapes of Llama-3.1-8B, and what launching costs the host. run.sh's
// stage "kernels" runs it, alone on the GPU.
//   kernel_bench [host] [decode_layer] [chunks] [attention] [rows] [cuts] [gemm] (none:
//   all). One line per figure, fields parted by tabs. Status 77: no GPU. LT=path:path says where
//   cuBLASLt may lie.
#include "kernel_bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>

#include "devices/cuda/runtime/stream.h"
#include "devices/cuda/runtime/stream_event.h"

namespace flowprefill {

double now_us() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void say(const char* section, const std::string& what, const std::string& figures) {
  std::printf("%s\t%s\t%s\n", section, what.c_str(), figures.c_str());
  std::fflush(stdout);
}

std::string text(const char* format, double a, double b, double c) {
  char out[200];
  std::snprintf(out, sizeof out, format, a, b, c);
  return out;
}

namespace {

template <typename T>
DeviceBuffer random_values(size_t count, float scale, unsigned seed, T (*rounded)(float)) {
  DeviceBuffer out(count * sizeof(T));
  std::vector<T> host(std::min<size_t>(count, size_t{1} << 20));
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  for (T& value : host)
    value = rounded(normal(random));
  const size_t piece = host.size() * sizeof(T);
  FP_CUDA(cudaMemcpy(out.get(), host.data(), piece, cudaMemcpyHostToDevice));
  for (size_t done = piece; done < out.bytes(); done *= 2)
    FP_CUDA(cudaMemcpy(out.get() + done, out.get(), std::min(done, out.bytes() - done),
                       cudaMemcpyDeviceToDevice));
  FP_CUDA(cudaDeviceSynchronize());
  return out;
}

}  // namespace

DeviceBuffer random_halves(size_t count, float scale, unsigned seed) {
  return random_values<Bf16>(count, scale, seed, to_bf16);
}

DeviceBuffer random_codes(size_t count, unsigned seed) {
  return random_values<E4m3>(count, 60.0f, seed, to_e4m3);
}

RmsNormArgs<Bf16> norm_args(const DeviceBuffer& hidden, const DeviceBuffer& weight,
                            const DeviceBuffer& out, int rows) {
  return {.hidden = floats(hidden),
          .ld_hidden = kHidden,
          .weight = floats(weight),
          .out = halves(out),
          .ld_out = kHidden,
          .rows = rows,
          .width = kHidden,
          .eps = 1e-5f};
}

RopeArgs<Bf16> rope_args(const BatchView& batch, const DeviceBuffer& qkv,
                         const DeviceBuffer& rotary, const DeviceBuffer& q,
                         const DeviceBuffer& cache, int rows) {
  return {.batch = batch,
          .qkv = halves(qkv),
          .ld_qkv = kQkv,
          .rotary = floats(rotary),
          .q = halves(q),
          .ld_q = kHeads * kDim,
          .cache = cache_of(cache),
          .q_scale = 1.442695f / std::sqrt(float{kDim}),
          .eps = 1e-5f,
          .rows = rows,
          .heads = kHeads,
          .kv_heads = kKv,
          .head_dim = kDim,
          .turning = kDim};
}

GemmArgs product_args(const DeviceBuffer& a, int depth, const DeviceBuffer& b, int columns,
                      const DeviceBuffer& d, int rows, bool adds) {
  return {.a = halves(a),
          .lda = depth,
          .b = halves(b),
          .ldb = depth,
          .d = d.get(),
          .ldd = columns,
          .output = adds ? GemmOutput::kFloat : GemmOutput::kBf16,
          .adds_to_d = adds,
          .row_begin = 0,
          .row_end = rows,
          .columns = columns,
          .depth = depth};
}

CacheView cache_of(const DeviceBuffer& cache, int block_shift) {
  const int64_t head = int64_t{kDim} << block_shift;
  Bf16* const keys = halves(cache);
  return {keys, keys + kKv * head, 2 * kKv * head, kDim, head, block_shift};
}

double once_us(const Launch& launch, int times, cudaStream_t stream) {
  static const StreamEvent start = StreamEvent::make(), stop = StreamEvent::make();
  start.record(stream);
  for (int i = 0; i < times; ++i)
    launch(stream);
  stop.record(stream);
  stop.wait();
  return static_cast<double>(stop.ns_since(start)) / 1e3 / times;
}

double device_us(const Launch& launch, cudaStream_t stream, int rounds) {
  const auto round = [&](int launches) { return once_us(launch, launches, stream); };
  round(1);
  const int launches = static_cast<int>(std::clamp(2000.0 / std::max(round(2), 1.0), 1.0, 200.0));
  std::vector<double> us;
  for (int i = 0; i < rounds; ++i)
    us.push_back(round(launches));
  return median(us);
}

void compare(const char* section, const std::string& what, const std::vector<Variant>& variants,
             int rounds, cudaStream_t stream) {
  constexpr double kWarmUs = 150e3;
  const double first_us = once_us(variants[0].launch, 1, stream);
  const int times = static_cast<int>(std::clamp(3000.0 / first_us, 1.0, 50.0));
  for (const double until = now_us() + kWarmUs; now_us() < until;)
    once_us(variants[0].launch, times, stream);
  std::vector<std::vector<double>> us(variants.size()), share(variants.size());
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < variants.size(); ++i) {
      us[i].push_back(once_us(variants[i].launch, times, stream));
      share[i].push_back(us[i].back() / us[0].back());
    }
  }
  for (size_t i = 0; i < variants.size(); ++i) {
    say(section, what + ", " + variants[i].name,
        text("%.1f us\t%+.2f us\t%+.2f %%", median(us[i]), median(us[i]) - median(us[0]),
             100 * (median(share[i]) - 1)));
  }
}

int multiprocessors() {
  int count = 0;
  FP_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

std::vector<int32_t> shuffled_blocks(int count) {
  std::vector<int32_t> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  std::shuffle(out.begin(), out.end(), std::mt19937(5));
  return out;
}

std::vector<Bf16> output_of(const AttentionArgs& args, size_t elements) {
  std::vector<Bf16> output(elements);
  FP_CUDA(cudaDeviceSynchronize());
  FP_CUDA(cudaMemcpy(output.data(), args.out, elements * sizeof(Bf16), cudaMemcpyDeviceToHost));
  return output;
}

void tell_difference(const char* section, const std::string& what, std::span<const Bf16> portable,
                     std::span<const Bf16> other) {
  double worst = 0, squares = 0, largest = 0;
  for (size_t i = 0; i < portable.size(); ++i) {
    const double difference = std::abs(widen(portable[i]) - widen(other[i]));
    worst = std::isnan(worst) || difference <= worst ? worst : difference;
    squares += difference * difference;
    largest = std::max<double>(largest, std::abs(widen(portable[i])));
  }
  const double typical = std::sqrt(squares / static_cast<double>(portable.size()));
  say(section, what,
      text(
          "off the portable one's by %.2g of its largest element at most (%.2g), %.2g of it by RMS",
          worst / largest, largest, typical / largest));
}

namespace {

struct Section {
  const char* name;
  void (*bench)(cudaStream_t);
};
constexpr Section kSections[] = {{"host", bench_host},     {"decode_layer", bench_decode},
                                 {"chunks", bench_chunks}, {"attention", bench_attention},
                                 {"rows", bench_rows},     {"cuts", bench_cuts},
                                 {"gemm", bench_gemm}};

bool is_wanted(const char* name, int argc, char** argv) {
  return argc < 2 || std::any_of(argv + 1, argv + argc,
                                 [&](const char* arg) { return std::strcmp(arg, name) == 0; });
}

// Why there is none; empty: it is told and current.
std::string missing_gpu() {
  int count = 0;
  const cudaError_t code = cudaGetDeviceCount(&count);
  if (code != cudaSuccess || count == 0)
    return cudaGetErrorString(code);
  cudaDeviceProp properties = {};
  FP_CUDA(cudaSetDevice(0));
  FP_CUDA(cudaGetDeviceProperties(&properties, 0));
  say("device", properties.name,
      text("%.0f multiprocessors, L2 %.0f MiB", properties.multiProcessorCount,
           properties.l2CacheSize / 1048576.0));
  return "";
}

int run_sections(int argc, char** argv) {
  const Stream stream = Stream::make();
  int status = 0;
  for (const Section& section : kSections) {
    if (!is_wanted(section.name, argc, argv))
      continue;
    try {
      section.bench(stream.get());
    } catch (const std::exception& error) {
      say(section.name, "FAILED", error.what());
      status = 1;
    }
  }
  return status;
}

}  // namespace
}  // namespace flowprefill

int main(int argc, char** argv) {
  if (const std::string reason = flowprefill::missing_gpu(); !reason.empty()) {
    std::printf("no GPU: %s\n", reason.c_str());
    return 77;
  }
  return flowprefill::run_sections(argc, argv);
}
