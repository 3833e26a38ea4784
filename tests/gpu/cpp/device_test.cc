#include "device_test.h"

#include <algorithm>
#include <numeric>

#ifdef FP_GPU_DOUBLE
#include "fake_cudart.h"
#include "host_kernels.h"
#endif

namespace flowprefill::testing {
namespace {

constexpr int kMinCapability = 80;

std::string error_text(cudaError_t code) {
  ignore(code);
  return std::string(cudaGetErrorName(code)) + ": " + cudaGetErrorString(code);
}

}  // namespace

std::string find_gpu(Gpu* gpu) {
  cudaDeviceProp properties = {};
  cudaError_t code = cudaSetDevice(0);
  if (code == cudaSuccess)
    code = cudaGetDeviceProperties(&properties, 0);
  if (code != cudaSuccess)
    return "no GPU: " + error_text(code);
  gpu->compute_capability = properties.major * 10 + properties.minor;
  gpu->num_multiprocessors = properties.multiProcessorCount;
  gpu->name = properties.name;
  if (gpu->compute_capability < kMinCapability) {
    return gpu->name + " has compute capability " + std::to_string(properties.major) + "." +
           std::to_string(properties.minor) + ", 8.0 or higher is needed";
  }
  return "";
}

void DeviceTest::SetUp() {
#ifdef FP_GPU_DOUBLE
  fake_cudart::reset();
  fake_cudart::set_compute_capability(90);
  fake_kernels::use_bodies(true);
#endif
  const std::string missing = find_gpu(&gpu_);
  if (!missing.empty())
    GTEST_SKIP() << missing;
  stream_ = Stream::make();
}

// An error that no test expected would be charged to the next test.
void DeviceTest::TearDown() {
  operands_.clear();
  if (!stream_)
    return;
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << error_text(cudaPeekAtLastError());
}

std::vector<float> DeviceTest::normals(size_t count, float scale) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> out(count);
  std::ranges::generate(out, [&] { return normal(random_); });
  return out;
}

std::vector<Bf16> DeviceTest::halves(size_t count, float scale) {
  std::vector<Bf16> out;
  for (const float value : normals(count, scale))
    out.push_back(to_bf16(value));
  return out;
}

std::vector<Bf16> DeviceTest::whole_halves(size_t count, int high) {
  std::vector<Bf16> out(count);
  std::ranges::generate(out, [&] { return to_bf16(static_cast<float>(integer(-high, high))); });
  return out;
}

std::vector<int32_t> DeviceTest::permutation(int32_t count) {
  std::vector<int32_t> out(static_cast<size_t>(count));
  std::iota(out.begin(), out.end(), 0);
  std::ranges::shuffle(out, random_);
  return out;
}

void DeviceTest::restore() {
  for (const auto& operand : operands_)
    operand->restore(stream_.get());
}

std::vector<std::vector<std::byte>> DeviceTest::fetch() const {
  std::vector<std::vector<std::byte>> out;
  for (const auto& operand : operands_)
    out.push_back(operand->fetch(stream_.get()));
  return out;
}

std::vector<std::vector<std::byte>> DeviceTest::run(const Launch& launch) {
  restore();
  FP_CUDA(launch(stream_.get()));
  stream_.synchronize();
  return fetch();
}

void DeviceTest::expect_same(const std::vector<std::vector<std::byte>>& got,
                             const std::vector<std::vector<std::byte>>& want,
                             const char* what) const {
  for (size_t i = 0; i < operands_.size(); ++i)
    EXPECT_TRUE(got[i] == want[i]) << operands_[i]->name() << ": " << what;
}

GraphExec DeviceTest::captured(const Launch& launch) {
  const Stream capturing = Stream::make();
  const Graph graph = capture(
      capturing.get(), [&](cudaStream_t stream) { FP_CUDA(launch(stream)); }, {.op = "test"});
  return GraphExec(graph, stream_.get(), {.op = "test"});
}

std::vector<std::vector<std::byte>> DeviceTest::replay(const GraphExec& exec) {
  return run([&](cudaStream_t stream) {
    exec.launch(stream, {.op = "test"});
    return cudaSuccess;
  });
}

void DeviceTest::expect_is_host(const std::vector<std::vector<std::byte>>& fetched) const {
  for (size_t i = 0; i < operands_.size(); ++i)
    operands_[i]->expect_is_host(fetched[i]);
}

void DeviceTest::expect_kernel(const Launch& launch, const std::function<void()>& plain) {
  const std::vector<std::vector<std::byte>> eager = run(launch);
  const GraphExec exec = captured(launch);
  expect_same(replay(exec), eager, "a first replay differs from eager");
  expect_same(replay(exec), eager, "a second replay differs from eager");
  plain();  // the host's side was restored before the last replay
  expect_is_host(eager);
}

void DeviceTest::expect_after_change(const Launch& launch, const std::function<void()>& plain,
                                     const std::function<void()>& change) {
  const GraphExec exec = captured(launch);
  change();
  const std::vector<std::vector<std::byte>> eager = run(launch);
  expect_same(replay(exec), eager, "a replay does not see what changed");
  plain();
  expect_is_host(eager);
}

}  // namespace flowprefill::testing
