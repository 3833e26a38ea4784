// The switch of overlapping launches and where they can be. Declared in kernels.h.
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/kernels/launch.cuh"

namespace flowprefill {
namespace {

constexpr bool kOverlapsByDefault = true;  // on an H200 it changes no bit, and decoding gains

constexpr const char* kVariable = "FLOWPREFILL_CUDA_PDL";

bool is_asked_for() {
  const char* value = std::getenv(kVariable);
  if (value == nullptr || *value == '\0')
    return kOverlapsByDefault;
  if (std::strcmp(value, "0") != 0 && std::strcmp(value, "1") != 0) {
    throw std::invalid_argument(std::string(kVariable) + ": got '" + value + "', expected 0 or 1");
  }
  return *value == '1';
}

std::atomic<bool>& is_on() {
  static std::atomic<bool> on = is_asked_for();
  return on;
}

// Code for less has no wait, though a newer device may run it. All kernels here are compiled for
// the same, so one of them tells.
bool has_wait() {
  cudaFuncAttributes attributes = {};
  if (softcap_attributes(&attributes) == cudaSuccess)
    return attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
  static_cast<void>(cudaGetLastError());
  return false;
}

enum class Known : uint8_t { kNothing, kLacksIt, kHasIt };
constexpr size_t kDevices = 64;

}  // namespace

bool overlap_launches(bool on) {
  return is_on().exchange(on);
}

bool overlaps_launches() {
  if (!is_on())
    return false;
  static std::array<std::atomic<Known>, kDevices> devices = {};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || static_cast<size_t>(device) >= kDevices)
    return false;
  std::atomic<Known>& known = devices[static_cast<size_t>(device)];
  if (known == Known::kNothing)
    known = has_wait() ? Known::kHasIt : Known::kLacksIt;
  return known == Known::kHasIt;
}

}  // namespace flowprefill
