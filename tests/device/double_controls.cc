// What the Python tests ask of the double of the CUDA runtime inside their _cuda module; called
// through ctypes.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <vector>

#include "fake_cudart.h"
#include "host_kernels.h"

#define FP_EXPORT extern "C" __attribute__((visibility("default")))

// The n-th call of this CUDA function from now on fails with this code.
FP_EXPORT void double_fail_call_of(const char* name, size_t n, int code) {
  fake_cudart::fail_call_of(name, n, static_cast<cudaError_t>(code));
}

// Calls made to fail so far.
FP_EXPORT size_t double_num_faults() {
  return fake_cudart::num_faults();
}

// CUDA handles and blocks of memory that exist.
FP_EXPORT int double_live_handles() {
  return fake_cudart::live().handles();
}

// 80: compute capability 8.0.
FP_EXPORT void double_set_compute_capability(int capability) {
  fake_cudart::set_compute_capability(capability);
}

// Launches of a kernel so far, by its name in host_kernels.cc.
FP_EXPORT size_t double_num_launches(const char* kernel) {
  const std::vector<std::string> names = fake_kernels::ran();
  return static_cast<size_t>(std::count(names.begin(), names.end(), kernel));
}

namespace {

int device_count_code = cudaSuccess;

}  // namespace

// What looking for devices returns from now on; 0: there is one.
FP_EXPORT void double_set_device_count_code(int code) {
  device_count_code = code;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count_code == cudaSuccess ? 1 : 0;
  return static_cast<cudaError_t>(device_count_code);
}
