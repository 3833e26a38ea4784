// simt::launch(): runs a kernel body on the host, one fibre per CUDA thread, so that barriers,
// shuffles, asynchronous copies and matrix instructions mean what they mean on the device. Used by
// every test of a kernel body.
//
// What it checks beyond the result: all threads reach every barrier, all lanes of a warp the same
// collective call. What makes races visible: warps run in random order and as far ahead of each
// other as barriers let them; a copy's bytes arrive no sooner than its wait; shared memory starts
// as NaN. What it cannot show: bank conflicts, registers, timing, and whether the PTX says what
// simt says.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace flowprefill::simt {

// A body broke a rule of the programming model.
class Violation : public std::logic_error {
  using std::logic_error::logic_error;
};

class Block;

// The host's counterpart of DeviceThread (cuda/kernels/thread.h): same members, same meaning.
class Thread {
 public:
  int32_t index() const { return index_; }
  void recompute() {}
  int32_t count() const;
  int32_t lane() const { return index_ % 32; }
  int32_t warp() const { return index_ / 32; }
  int32_t block_x() const;
  int32_t block_y() const;
  int32_t grid_x() const;

  template <typename T>
  T* shared() const {
    return reinterpret_cast<T*>(shared_bytes());
  }
  // Kernels do not overlap here; see Grid::overlaps.
  void wait_for_predecessor() const;
  void let_successor_start() const {}
  void sync() const;
  void sync_warp() const;
  float shuffle_xor(float value, int mask) const;
  int32_t shuffle_xor(int32_t value, int mask) const;
  uint32_t add(uint32_t* shared, uint32_t value) const;
  void copy_16(void* to, const void* from, bool is_valid) const;
  void prefetch(const void* /*from*/) const {}
  void wait_for_copies() const;
  void end_copies() const;
  template <int kCount>
  void wait_for_copies_but() const {
    wait_for_groups_but(kCount);
  }
  void load_matrices(const void* row, uint32_t (&out)[4]) const;
  void load_matrices_transposed(const void* row, uint32_t (&out)[4]) const;
  void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const;
  void multiply_add_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const;

 private:
  friend class Block;
  Thread(Block* block, int32_t index) : block_(block), index_(index) {}
  unsigned char* shared_bytes() const;
  void wait_for_groups_but(int32_t count) const;
  void wait_for_copies_before(int32_t group) const;

  Block* block_;
  int32_t index_;
};

struct Grid {
  int32_t x = 1;
  int32_t y = 1;
  int32_t threads = 32;  // per block, a multiple of 32
  size_t shared_bytes = 0;
  uint32_t seed = 1;      // of the order in which threads run
  bool overlaps = false;  // the body waits for the kernel before it: every thread has to
  // What the kernel before writes: a thread that copies from there before it waited violates.
  std::function<bool(const void*)> is_made_before = nullptr;
};

// Runs `body` for every thread of every block, one block after the other. Throws Violation, or what
// the body throws. Thread: any, one launch at a time per thread.
void launch(const Grid& grid, const std::function<void(const Thread&)>& body);

}  // namespace flowprefill::simt
