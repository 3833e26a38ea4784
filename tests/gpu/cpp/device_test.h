// DeviceTest: base of every test here. Skips without a usable GPU, with the reason; has the memory
// of a kernel's operands on both sides, and expect_kernel(), which compares the kernel with plain
// loops on the host and a captured graph with eager launches.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/runtime/graph.h"
#include "devices/cuda/runtime/memory.h"
#include "devices/cuda/runtime/stream.h"
#include "plain_kernels.h"

namespace flowprefill::testing {

// One rounding to bf16 errs by no more than this share; two that round nearly equal numbers lie no
// further apart than twice that.
inline constexpr double kBf16Rounding = 1.0 / 256;
inline constexpr double kOneStep = 2 * kBf16Rounding;
// Of a float that a handful of operations made.
inline constexpr double kFloatRounding = 1e-6;

#ifdef FP_GPU_DOUBLE
inline constexpr bool kIsDouble = true;  // kernels run on the host: small sizes
#else
inline constexpr bool kIsDouble = false;
#endif

enum class Place { kHost, kDevice };

// An operand without its type: what expect_kernel() moves and compares.
class Operand {
 public:
  explicit Operand(std::string name) : name_(std::move(name)) {}
  virtual ~Operand() = default;

  // Both sides as they were at first.
  virtual void restore(cudaStream_t stream) = 0;
  virtual std::vector<std::byte> fetch(cudaStream_t stream) const = 0;
  // Expects what fetch() gave to be what the host has, within the tolerance.
  virtual void expect_is_host(const std::vector<std::byte>& fetched) const = 0;
  const std::string& name() const { return name_; }

 private:
  const std::string name_;
};

template <typename T>
class Array final : public Operand {
 public:
  Array(std::string name, std::vector<T> values)
      : Operand(std::move(name)),
        initial_(std::move(values)),
        host_(initial_),
        device_(initial_.size() * sizeof(T)) {}

  T* at(Place place) {
    return place == Place::kHost ? host_.data() : reinterpret_cast<T*>(device_.get());
  }
  std::vector<T>& initial() { return initial_; }
  std::vector<T>& host() { return host_; }

  // Elements may differ by relative * scale + absolute; scale: |what the host has|, or one number
  // per element. Never said: all bits are equal.
  void allow(double relative, double absolute, std::vector<double> scale = {}) {
    relative_ = relative;
    absolute_ = absolute;
    scale_ = std::move(scale);
  }

  void restore(cudaStream_t stream) override {
    host_ = initial_;
    FP_CUDA(
        cudaMemcpyAsync(device_.get(), initial_.data(), bytes(), cudaMemcpyHostToDevice, stream));
    FP_CUDA(cudaStreamSynchronize(stream));
  }

  std::vector<std::byte> fetch(cudaStream_t stream) const override {
    std::vector<std::byte> out(bytes());
    FP_CUDA(cudaMemcpyAsync(out.data(), device_.get(), bytes(), cudaMemcpyDeviceToHost, stream));
    FP_CUDA(cudaStreamSynchronize(stream));
    return out;
  }

  void expect_is_host(const std::vector<std::byte>& fetched) const override {
    std::vector<T> got(host_.size());
    std::memcpy(got.data(), fetched.data(), bytes());
    size_t num_wrong = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      if (is_close(got[i], i) || ++num_wrong > 3)
        continue;
      ADD_FAILURE() << name() << "[" << i << "] of " << got.size() << ": got " << number(got[i])
                    << ", the host has " << number(host_[i]);
    }
    EXPECT_EQ(num_wrong, 0u) << name();
  }

 private:
  size_t bytes() const { return initial_.size() * sizeof(T); }

  static double number(const T& value) {
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, Bf16>) {
      return widen(value);
    } else if constexpr (std::is_arithmetic_v<T>) {
      return static_cast<double>(value);
    } else {
      return 0;
    }
  }
  bool is_close(const T& got, size_t i) const {
    if (std::memcmp(&got, &host_[i], sizeof(T)) == 0)
      return true;
    const double want = number(host_[i]);
    const double allowed = relative_ * (scale_.empty() ? std::abs(want) : scale_[i]) + absolute_;
    return std::abs(number(got) - want) <= allowed && relative_ + absolute_ > 0;
  }

  std::vector<T> initial_;
  std::vector<T> host_;
  DeviceBuffer device_;
  double relative_ = 0;
  double absolute_ = 0;
  std::vector<double> scale_;
};

// The device's number 0 as the kernels need to know it.
struct Gpu {
  int compute_capability = 0;
  int num_multiprocessors = 0;
  std::string name;
};

// Why the suite cannot run here; empty: it can, and *gpu is filled.
std::string find_gpu(Gpu* gpu);

class DeviceTest : public ::testing::Test {
 protected:
  using Launch = std::function<cudaError_t(cudaStream_t)>;

  void SetUp() override;
  void TearDown() override;

  template <typename T>
  Array<T>& add(std::string name, std::vector<T> values) {
    auto array = std::make_unique<Array<T>>(std::move(name), std::move(values));
    Array<T>& out = *array;
    operands_.push_back(std::move(array));
    return out;
  }

  // Launches eagerly, then twice from a captured graph, each time on restored operands: all three
  // leave the same bits in every operand. Then `plain` on the host: equal within what the operands
  // allow, and what neither should write is as it was.
  void expect_kernel(const Launch& launch, const std::function<void()>& plain);

  // Captures, then lets `change` alter what operands hold at first: a replay and an eager launch
  // see the change alike, and it is what the host computes.
  void expect_after_change(const Launch& launch, const std::function<void()>& plain,
                           const std::function<void()>& change);

  // What the operands hold after one eager launch on restored ones.
  std::vector<std::vector<std::byte>> run(const Launch& launch);
  // Forgets the operands: for tests of several shapes.
  void forget() { operands_.clear(); }

  std::vector<float> normals(size_t count, float scale = 1.0f);
  std::vector<Bf16> halves(size_t count, float scale = 1.0f);
  // Whole numbers -high..high: sums of products of few of them are exact in any order.
  std::vector<Bf16> whole_halves(size_t count, int high);
  int32_t integer(int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(random_);
  }
  std::vector<int32_t> permutation(int32_t count);

  Gpu gpu_;
  Stream stream_;
  std::mt19937 random_{7};

 private:
  GraphExec captured(const Launch& launch);
  std::vector<std::vector<std::byte>> replay(const GraphExec& exec);
  void expect_is_host(const std::vector<std::vector<std::byte>>& fetched) const;
  std::vector<std::vector<std::byte>> fetch() const;
  void restore();
  void expect_same(const std::vector<std::vector<std::byte>>& got,
                   const std::vector<std::vector<std::byte>>& want, const char* what) const;

  std::vector<std::unique_ptr<Operand>> operands_;
};

inline std::vector<float> filled(size_t count) {
  return std::vector<float>(count, std::nanf(""));
}
inline std::vector<Bf16> filled_halves(size_t count) {
  return std::vector<Bf16>(count, Bf16{0x7fc1});  // a NaN
}

}  // namespace flowprefill::testing
