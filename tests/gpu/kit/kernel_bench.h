// What the parts of kernel_bench share: shapes of Llama-3.1-8B, random numbers, times, lines of
// output. Helpers are in kernel_bench.cc; each bench_*() is a section of its output.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "devices/cuda/backend/gemm_selector.h"
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/runtime/memory.h"

namespace flowprefill {

constexpr int kHidden = 4096, kInner = 14336, kHeads = 32, kKv = 8, kDim = 128, kVocab = 128256;
constexpr int kQkv = (kHeads + 2 * kKv) * kDim;
constexpr int kBlockShift = 6;
constexpr int kBlockTokens = 1 << kBlockShift;  // the product's own
constexpr int kRows = 4096;                     // of the kernels of rows
constexpr int kTile = 2048;                     // rows that go through a layer together

using Launch = std::function<void(cudaStream_t)>;

double now_us();
double median(std::vector<double> values);
// One line, fields parted by tabs.
void say(const char* section, const std::string& what, const std::string& figures);
std::string text(const char* format, double a, double b = 0, double c = 0);

// Random numbers; made on the host once, then doubled on the device.
DeviceBuffer random_halves(size_t count, float scale, unsigned seed);
DeviceBuffer random_codes(size_t count, unsigned seed);

template <typename T>
DeviceBuffer on_device(const std::vector<T>& values) {
  DeviceBuffer out(values.size() * sizeof(T));
  FP_CUDA(cudaMemcpy(out.get(), values.data(), out.bytes(), cudaMemcpyHostToDevice));
  return out;
}
template <typename T>
T* as(const DeviceBuffer& buffer) {
  return reinterpret_cast<T*>(buffer.get());
}
inline Bf16* halves(const DeviceBuffer& buffer) {
  return as<Bf16>(buffer);
}
inline float* floats(const DeviceBuffer& buffer) {
  return as<float>(buffer);
}

// Arguments of kernels on `rows` rows of that shape, each buffer one dense matrix.
RmsNormArgs<Bf16> norm_args(const DeviceBuffer& hidden, const DeviceBuffer& weight,
                            const DeviceBuffer& out, int rows);
RopeArgs<Bf16> rope_args(const BatchView& batch, const DeviceBuffer& qkv,
                         const DeviceBuffer& rotary, const DeviceBuffer& q,
                         const DeviceBuffer& cache, int rows);
// a [rows, depth] times b [columns, depth], into bf16 or added to float.
GemmArgs product_args(const DeviceBuffer& a, int depth, const DeviceBuffer& b, int columns,
                      const DeviceBuffer& d, int rows, bool adds);
// One layer's keys and values.
CacheView cache_of(const DeviceBuffer& cache, int block_shift = kBlockShift);

// Device time of one of so many launches, us.
double once_us(const Launch& launch, int times, cudaStream_t stream);
// Median device time of one launch, us: rounds of so many launches that a round takes a millisecond
// or more.
double device_us(const Launch& launch, cudaStream_t stream, int rounds = 7);

// Launches of the same work, each in turn with the others, so that clocks and temperature are the
// same for all. Tells the median of each, and its share of the first one's of its round.
struct Variant {
  std::string name;
  Launch launch;
};
void compare(const char* section, const std::string& what, const std::vector<Variant>& variants,
             int rounds, cudaStream_t stream);

int multiprocessors();
// Blocks of the cache in no order, as a server has them after a while.
std::vector<int32_t> shuffled_blocks(int count);
// What attention left there.
std::vector<Bf16> output_of(const AttentionArgs& args, size_t elements);
// By how much another kernel's output is off, as shares of the largest element; a NaN stays.
void tell_difference(const char* section, const std::string& what, std::span<const Bf16> portable,
                     std::span<const Bf16> other);

// Without measured choices, as an engine with cuBLASLt has it; why that library is not there.
std::unique_ptr<GemmSelector> make_selector(std::string* reason);

void bench_host(cudaStream_t stream);
void bench_decode(cudaStream_t stream);
void bench_attention(cudaStream_t stream);
void bench_rows(cudaStream_t stream);
void bench_gemm(cudaStream_t stream);
void bench_cuts(cudaStream_t stream);
void bench_chunks(cudaStream_t stream);

}  // namespace flowprefill
