// CUTLASS's device code on the host: barriers, shuffles, ldmatrix and mma.sync are those of simt,
// accesses to memory are plain copies (so a missing wait for a copy does not show). Included first
// by gemm_kernels_test.cc. What its kernels do not use throws.
#pragma once

#include <cuda_runtime_api.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

#include "simt.h"

namespace flowprefill::simt {

// The thread whose code runs now; named again after whatever lets others run.
inline const Thread* current = nullptr;

template <typename T>
T not_on_host() {
  throw std::logic_error("a built-in of CUDA that has no meaning on the host");
}

}  // namespace flowprefill::simt

inline uint3 threadIdx;
inline uint3 blockIdx;
inline dim3 blockDim;
inline dim3 gridDim;

namespace flowprefill::simt {

inline void become(const Thread& thread) {
  current = &thread;
  threadIdx = {static_cast<unsigned>(thread.index()), 0, 0};
}

// Runs a collective call of the current thread.
template <typename Call>
auto collectively(const Call& call) {
  const Thread& me = *current;
  if constexpr (std::is_void_v<decltype(call(me))>) {
    call(me);
    become(me);
  } else {
    const auto result = call(me);
    become(me);
    return result;
  }
}

// Four matrices as ldmatrix loads them; `caller` tells which of CUTLASS's overloads it is.
template <typename Registers>
void load_matrices(Registers& out, const void* row, const char* caller) {
  if constexpr (sizeof(out) == 16) {
    if (std::string(caller).find("RowMajor") == std::string::npos)
      not_on_host<int>();
    collectively(
        [&](const Thread& me) { me.load_matrices(row, reinterpret_cast<uint32_t(&)[4]>(out)); });
  } else {
    not_on_host<int>();
  }
}

// The product of 16 x 8 x 16 bf16; others are not used.
template <typename D, typename A, typename B, typename C>
void multiply_add(D& d, const A& a, const B& b, const C& c) {
  if constexpr (sizeof(d) == 16 && sizeof(a) == 16 && sizeof(b) == 8 && sizeof(c) == 16) {
    float sums[4];
    uint32_t of_a[4];
    uint32_t of_b[2];
    std::memcpy(sums, &c, sizeof sums);
    std::memcpy(of_a, &a, sizeof of_a);
    std::memcpy(of_b, &b, sizeof of_b);
    collectively([&](const Thread& me) { me.multiply_add(sums, of_a, of_b[0], of_b[1]); });
    std::memcpy(static_cast<void*>(&d), sums, sizeof sums);
  } else {
    not_on_host<int>();
  }
}

}  // namespace flowprefill::simt

inline void __syncthreads() {
  flowprefill::simt::collectively([](const auto& me) { me.sync(); });
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
T __shfl_sync(unsigned, T value, int source, int = 32) {
  static_assert(sizeof(T) == sizeof(int32_t));
  return flowprefill::simt::collectively([&](const auto& me) {
    return static_cast<T>(me.shuffle_xor(static_cast<int32_t>(value), me.lane() ^ source));
  });
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

// On the host these say that every thread is the first of warp 0.
#define canonical_warp_idx canonical_warp_idx_of_host
#define canonical_warp_idx_sync canonical_warp_idx_sync_of_host
#define canonical_lane_idx canonical_lane_idx_of_host
#include <cutlass/cutlass.h>
#undef canonical_warp_idx
#undef canonical_warp_idx_sync
#undef canonical_lane_idx

namespace cutlass {
inline int canonical_warp_idx() {
  return flowprefill::simt::current->warp();
}
inline int canonical_warp_idx_sync() {
  return flowprefill::simt::current->warp();
}
inline int canonical_lane_idx() {
  return flowprefill::simt::current->lane();
}
}  // namespace cutlass

#include <cutlass/arch/cache_operation.h>
#include <cutlass/array.h>
#include <cutlass/complex.h>
#include <cutlass/functional.h>
#include <cutlass/gemm/gemm.h>
#include <cutlass/layout/matrix.h>
#include <cutlass/numeric_types.h>
#include <cutlass/platform/platform.h>
#include <cutlass/quaternion.h>

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/util.hpp>

// Where CUTLASS's instructions have no code for the host, it calls this macro, among the
// instruction's operands.
#pragma push_macro("CUTLASS_NOT_IMPLEMENTED")
#undef CUTLASS_NOT_IMPLEMENTED
#define CUTLASS_NOT_IMPLEMENTED() ::flowprefill::simt::load_matrices(D, ptr, __PRETTY_FUNCTION__)
#include <cutlass/arch/memory_sm75.h>
#undef CUTLASS_NOT_IMPLEMENTED
#define CUTLASS_NOT_IMPLEMENTED() ::flowprefill::simt::multiply_add(d, a, b, c)
#include <cutlass/arch/mma.h>
#pragma pop_macro("CUTLASS_NOT_IMPLEMENTED")

// Split products alone use semaphores.
#define asm
#define volatile(...) ::flowprefill::simt::not_on_host<int>()
#include <cutlass/semaphore.h>
#undef asm
#undef volatile

#define global_load global_load_by_ptx
#define global_store global_store_by_ptx
#include <cutlass/arch/memory.h>
#undef global_load
#undef global_store

namespace cutlass::arch {

template <typename Access, int kBytes, CacheOperation::Kind kCache = CacheOperation::Always>
struct global_load {
  global_load(Access& out, const void* from, bool is_valid) {
    if (is_valid)
      std::memcpy(static_cast<void*>(&out), from, kBytes);
  }
};

template <typename Access, int kBytes>
struct global_store {
  global_store(const Access& value, void* to, bool is_valid) {
    if (is_valid)
      std::memcpy(to, static_cast<const void*>(&value), kBytes);
  }
};

}  // namespace cutlass::arch
