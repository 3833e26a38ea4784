// What CUTLASS's device code needs to compile and run on the host: the built-ins of CUDA that its
// headers name. Included first by gated_epilogue_test.cc. Only barriers mean something here: they
// are those of simt; the other names are in parts of the headers that the test does not run.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>

#include "simt.h"

namespace flowprefill::simt {

// The thread whose body runs now; set when a body starts and after each of its barriers.
inline const Thread* current = nullptr;

template <typename T>
T not_on_host() {
  throw std::logic_error("a built-in of CUDA that has no meaning on the host");
}

}  // namespace flowprefill::simt

inline thread_local uint3 threadIdx;
inline thread_local uint3 blockIdx;
inline thread_local dim3 blockDim;
inline thread_local dim3 gridDim;

inline void __syncthreads() {
  const flowprefill::simt::Thread* me = flowprefill::simt::current;
  me->sync();
  flowprefill::simt::current = me;
}
inline int __syncthreads_and(int) {
  return flowprefill::simt::not_on_host<int>();
}
inline void __syncwarp(unsigned = 0) {
  flowprefill::simt::not_on_host<int>();
}
inline void __threadfence() {
  flowprefill::simt::not_on_host<int>();
}
template <typename T, typename V>
T atomicAdd(T*, V) {
  return flowprefill::simt::not_on_host<T>();
}
template <typename T, typename V, typename W>
T atomicCAS(T*, V, W) {
  return flowprefill::simt::not_on_host<T>();
}
template <typename T>
T __shfl_sync(unsigned, T, int, int = 32) {
  return flowprefill::simt::not_on_host<T>();
}
template <typename T>
T __shfl_xor_sync(unsigned, T, int, int = 32) {
  return flowprefill::simt::not_on_host<T>();
}

namespace cutlass::arch {
inline int LaneId() {
  return flowprefill::simt::not_on_host<int>();
}
inline int SmId() {
  return flowprefill::simt::not_on_host<int>();
}
}  // namespace cutlass::arch
