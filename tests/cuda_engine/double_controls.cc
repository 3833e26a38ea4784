// What the Python tests ask of the double of the CUDA runtime inside their _cuda module; called
// through ctypes.
#include <cuda_runtime_api.h>

#include "fake_cudart.h"

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

// The double has one device. Weak: it may come to answer by itself.
__attribute__((weak)) cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
