// DeviceThread: what a kernel body asks of the thread it runs as. Given to the bodies by the .cu
// files here; tests/cpp/kernels has the same interface for the host (SimtThread), so that the
// bodies themselves run on a CPU.
#pragma once

#include "devices/cuda/kernels/portable.h"

namespace flowprefill {

#if FP_ON_DEVICE
#define FP_DEVICE_ONLY(...) __VA_ARGS__
#else
#define FP_DEVICE_ONLY(...)
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FP_HOPPER_ONLY(...) __VA_ARGS__
#else
#define FP_HOPPER_ONLY(...)
#endif

// One thread of a one-dimensional block in a two-dimensional grid. Collective calls (sync,
// shuffles, matrices) must be reached by all threads of the block or warp.
class DeviceThread {
 public:
  // `shared`: the block's dynamic shared memory.
  FP_HD explicit DeviceThread(unsigned char* shared)
      : index_(FP_DEVICE_ONLY(static_cast<int32_t>(threadIdx.x) +) 0), shared_(shared) {}

  FP_HD int32_t index() const { return index_; }
  // Keeps the compiler from holding what follows from index() in registers across this call.
  FP_HD void recompute() { FP_DEVICE_ONLY(asm volatile("" : "+r"(index_));) }
  FP_HD int32_t count() const { return FP_DEVICE_ONLY(static_cast<int32_t>(blockDim.x) +) 0; }
  FP_HD int32_t lane() const { return index() % 32; }
  FP_HD int32_t warp() const { return index() / 32; }
  FP_HD int32_t block_x() const { return FP_DEVICE_ONLY(static_cast<int32_t>(blockIdx.x) +) 0; }
  FP_HD int32_t block_y() const { return FP_DEVICE_ONLY(static_cast<int32_t>(blockIdx.y) +) 0; }
  FP_HD int32_t grid_x() const { return FP_DEVICE_ONLY(static_cast<int32_t>(gridDim.x) +) 0; }

  template <typename T>
  FP_HD T* shared() const {
    return reinterpret_cast<T*>(shared_);
  }

  // Waits for the end of the kernel before this one, if that still runs (launch.cuh): what kernels
  // wrote is there after, and nothing reads what this one overwrites.
  FP_HD void wait_for_predecessor() const {
    FP_HOPPER_ONLY(asm volatile("griddepcontrol.wait;" ::: "memory");)
  }
  // Lets the next kernel start, as far as it does not wait for this one, when all blocks came here.
  FP_HD void let_successor_start() const {
    FP_HOPPER_ONLY(asm volatile("griddepcontrol.launch_dependents;" ::: "memory");)
  }

  // Waits for the block; what its threads wrote to shared memory before is seen after.
  FP_HD void sync() const { FP_DEVICE_ONLY(__syncthreads();) }

  // As sync(), of the warp.
  FP_HD void sync_warp() const { FP_DEVICE_ONLY(__syncwarp();) }

  // The value of lane (lane() ^ mask).
  FP_HD float shuffle_xor(float value, int mask) const {
    FP_DEVICE_ONLY(value = __shfl_xor_sync(0xffffffffu, value, mask);)
    static_cast<void>(mask);
    return value;
  }
  FP_HD int32_t shuffle_xor(int32_t value, int mask) const {
    FP_DEVICE_ONLY(value = __shfl_xor_sync(0xffffffffu, value, mask);)
    static_cast<void>(mask);
    return value;
  }

  // Adds to shared memory, in one step for all threads; returns what was there before.
  FP_HD uint32_t add(uint32_t* shared, uint32_t value) const {
    uint32_t before = 0;
    FP_DEVICE_ONLY(before = atomicAdd(shared, value);)
    static_cast<void>(shared), static_cast<void>(value);
    return before;
  }

  // Starts a copy of 16 bytes from global to shared memory, of zeros where !is_valid (`from` is not
  // read then but must be an address). Both 16-byte aligned.
  FP_HD void copy_16(void* to, const void* from, bool is_valid) const {
    FP_DEVICE_ONLY(const uint32_t bytes = is_valid ? 16 : 0;
                   asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)),
                                "l"(from), "r"(bytes)
                                : "memory");)
    static_cast<void>(to), static_cast<void>(from), static_cast<void>(is_valid);
  }

  // Brings the 128 bytes around `from`, global, into the L2 cache; waits for nothing.
  FP_HD void prefetch(const void* from) const {
    FP_DEVICE_ONLY(asm volatile("prefetch.global.L2 [%0];" ::"l"(from));)
    static_cast<void>(from);
  }

  // Waits for the copies that this thread started; others' need a sync() after.
  FP_HD void wait_for_copies() const {
    FP_DEVICE_ONLY(asm volatile("cp.async.wait_all;" ::: "memory");)
  }

  // Ends a group of copies: those that this thread started since the last one.
  FP_HD void end_copies() const {
    FP_DEVICE_ONLY(asm volatile("cp.async.commit_group;" ::: "memory");)
  }
  // Waits for all groups that this thread ended but the last kCount.
  template <int kCount>
  FP_HD void wait_for_copies_but() const {
    FP_DEVICE_ONLY(asm volatile("cp.async.wait_group %0;" ::"n"(kCount) : "memory");)
  }

  // Four 8 x 8 matrices of bf16 from shared memory. Lane i gives the address of row i % 8 of matrix
  // i / 8 (8 elements, 16-byte aligned) and gets of each matrix row lane / 4, columns 2 * (lane %
  // 4) and the next; transposed: column lane / 4, rows 2 * (lane % 4) and the next.
  FP_HD void load_matrices(const void* row, uint32_t (&out)[4]) const {
    FP_DEVICE_ONLY(asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                                : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                                : "r"(address(row))
                                : "memory");)
    static_cast<void>(row), static_cast<void>(out);
  }
  FP_HD void load_matrices_transposed(const void* row, uint32_t (&out)[4]) const {
    FP_DEVICE_ONLY(
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(address(row))
                     : "memory");)
    static_cast<void>(row), static_cast<void>(out);
  }

  // c[16, 8] += a[16, 16] * b[16, 8] of bf16 on the warp; which element lies where: mma_layout.h.
  FP_HD void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    FP_DEVICE_ONLY(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));)
    static_cast<void>(c), static_cast<void>(a), static_cast<void>(b0), static_cast<void>(b1);
  }
  // The same of f16.
  FP_HD void multiply_add_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                              uint32_t b1) const {
    FP_DEVICE_ONLY(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                                "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));)
    static_cast<void>(c), static_cast<void>(a), static_cast<void>(b0), static_cast<void>(b1);
  }

 private:
  static FP_HD uint32_t address(const void* shared) {
    uint32_t out = 0;
    FP_DEVICE_ONLY(out = static_cast<uint32_t>(__cvta_generic_to_shared(shared));)
    static_cast<void>(shared);
    return out;
  }

  int32_t index_;
  unsigned char* shared_;
};

// ---- collectives built on the above

template <class Thread>
FP_HD float warp_sum(const Thread& t, float value) {
  FP_UNROLL for (int mask = 16; mask > 0; mask /= 2) value += t.shuffle_xor(value, mask);
  return value;
}

// Sum over the block, the same bits in every thread. `scratch`: shared, one float per warp; it may
// be used again after the next sync().
template <class Thread>
FP_HD float block_sum(const Thread& t, float value, float* scratch) {
  value = warp_sum(t, value);
  if (t.lane() == 0)
    scratch[t.warp()] = value;
  t.sync();
  float total = 0.0f;
  for (int32_t warp = 0; warp < t.count() / 32; ++warp)
    total += scratch[warp];
  return total;
}

}  // namespace flowprefill
