#include "simt.h"

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <string>

#include "devices/cuda/kernels/mma_layout.h"
#include "devices/cuda/kernels/portable.h"

namespace flowprefill::simt {
namespace {

constexpr int32_t kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

enum class Call : uint8_t {
  kNone,
  kSync,
  kSyncWarp,
  kShuffle,
  kLoad,
  kLoadTransposed,
  kMultiplyAdd,
  kMultiplyAddF16
};

// What a thread brings to a collective call, and what it takes home.
struct Operands {
  Call call = Call::kNone;
  uint32_t value = 0;  // shuffle
  int mask = 0;
  const void* row = nullptr;   // load: in
  uint32_t* loaded = nullptr;  // load: out
  float* c = nullptr;          // multiply_add
  const uint32_t* a = nullptr;
  uint32_t b[2] = {};
};

struct Copy {
  void* to;
  unsigned char bytes[16];
  int32_t group;  // of its thread's
};

Bf16 half(uint32_t pair, int which) {
  return static_cast<Bf16>(pair >> (16 * which));
}

float widen_bf16(uint16_t bits) {
  return widen(bits);
}

// IEEE 754, binary16.
float widen_f16(uint16_t bits) {
  const int exponent = bits >> 10 & 31;
  const auto fraction = static_cast<float>(bits & 1023);
  float size =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31)
    size = fraction == 0 ? INFINITY : NAN;
  return bits >> 15 == 0 ? size : -size;
}

}  // namespace

class Block {
 public:
  Block(const Grid& grid, int32_t x, int32_t y, const std::function<void(const Thread&)>& body)
      : grid_(grid),
        x_(x),
        y_(y),
        body_(body),
        fibres_(static_cast<size_t>(grid.threads)),
        random_(grid.seed + static_cast<uint32_t>(x * 131 + y)),
        lanes_(kWarp) {
    std::iota(lanes_.begin(), lanes_.end(), 0);
    // 0xff bytes are NaN as float and as bf16.
    shared_.resize(grid.shared_bytes / sizeof(Words) + 1);
    std::memset(shared_.data(), 0xff, shared_.size() * sizeof(Words));
  }

  // Warps advance independently, as far apart as barriers let them: each turn goes to a random
  // warp, for a few collective calls or up to its next barrier.
  void run() {
    for (int32_t i = 0; i < grid_.threads; ++i)
      start(i);
    std::vector<int32_t> able;
    while (unfinished_ > 0) {
      able.clear();
      for (int32_t first = 0; first < grid_.threads; first += kWarp) {
        if (!is_stopped(first))
          able.push_back(first);
      }
      if (able.empty()) {
        complete_block();
        continue;
      }
      const int32_t first = able[random_() % able.size()];
      const int32_t turns = random_() % 2 == 0 ? INT32_MAX : static_cast<int32_t>(random_() % 4);
      for (int32_t turn = 0; turn <= turns && !is_stopped(first); ++turn)
        advance(first);
    }
  }

  // ---- called on a fibre

  void wait(const Thread& thread, const Operands& operands) {
    Fibre& self = fibre(thread.index());
    self.operands = operands;
    self.is_ready = false;
    swapcontext(&self.context, &scheduler_);
  }
  Operands& operands(int32_t index) { return fibre(index).operands; }
  std::vector<Copy>& copies(int32_t index) { return fibre(index).copies; }
  int32_t& group(int32_t index) { return fibre(index).group; }
  void wait_for_predecessor(int32_t index) { fibre(index).has_waited = true; }
  void expect_made(int32_t index, const void* from) {
    if (!fibre(index).has_waited && grid_.is_made_before && grid_.is_made_before(from))
      throw Violation("a copy of what the kernel before writes, before its end");
  }
  const Grid& grid() const { return grid_; }
  int32_t x() const { return x_; }
  int32_t y() const { return y_; }
  unsigned char* shared() { return shared_.data()->bytes; }
  const unsigned char* shared_end() const { return shared_.data()->bytes + grid_.shared_bytes; }

 private:
  struct alignas(16) Words {
    unsigned char bytes[16];
  };
  struct Fibre {
    ucontext_t context;
    std::unique_ptr<unsigned char[]> stack;
    Operands operands;
    std::vector<Copy> copies;
    int32_t group = 0;  // of the copies that are started now
    bool is_ready = true;
    bool is_finished = false;
    bool has_waited = false;  // for the kernel before
  };

  Fibre& fibre(int32_t index) { return fibres_[static_cast<size_t>(index)]; }

  void start(int32_t index) {
    Fibre& f = fibre(index);
    f.stack = std::make_unique_for_overwrite<unsigned char[]>(kStackBytes);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = nullptr;
    const auto self = reinterpret_cast<uintptr_t>(this);  // makecontext passes ints only
    makecontext(&f.context, reinterpret_cast<void (*)()>(&Block::enter), 3,
                static_cast<unsigned>(self), static_cast<unsigned>(self >> 32), index);
    ++unfinished_;
  }

  static void enter(unsigned low, unsigned high, int32_t index) {
    auto* block = reinterpret_cast<Block*>(uintptr_t{high} << 32 | low);
    try {
      block->body_(Thread(block, index));
      if (block->grid_.overlaps && !block->fibre(index).has_waited)
        throw Violation("a thread ended without waiting for the kernel before");
    } catch (...) {
      block->error_ = std::current_exception();
    }
    Fibre& self = block->fibre(index);
    self.is_finished = true;
    self.is_ready = false;
    --block->unfinished_;
    swapcontext(&self.context, &block->scheduler_);
  }

  void resume(int32_t index) { swapcontext(&scheduler_, &fibre(index).context); }

  // Whether the warp waits at a barrier or has ended.
  bool is_stopped(int32_t first) {
    const Fibre& f = fibre(first);
    return f.is_finished || (!f.is_ready && f.operands.call == Call::kSync);
  }

  // Runs the lanes of a warp, in random order, to their next call, and completes that.
  void advance(int32_t first) {
    std::shuffle(lanes_.begin(), lanes_.end(), random_);
    for (const int32_t lane : lanes_) {
      resume(first + lane);
      if (error_)
        std::rethrow_exception(error_);
    }
    complete_warp(first);
  }

  void complete_warp(int32_t first) {
    const Call call = fibre(first).operands.call;
    for (int32_t i = first; i < first + kWarp; ++i) {
      if (fibre(i).is_finished != fibre(first).is_finished || fibre(i).operands.call != call)
        throw Violation("lanes of warp " + std::to_string(first / kWarp) +
                        " wait in different calls");
    }
    if (is_stopped(first))
      return;
    switch (call) {
      case Call::kSyncWarp:
        break;
      case Call::kShuffle:
        shuffle(first);
        break;
      case Call::kMultiplyAdd:
        multiply_add(first, widen_bf16);
        break;
      case Call::kMultiplyAddF16:
        multiply_add(first, widen_f16);
        break;
      default:
        load(first, call == Call::kLoadTransposed);
    }
    release(first, first + kWarp);
  }

  void complete_block() {
    for (const Fibre& f : fibres_) {
      if (f.is_finished)
        throw Violation("a thread ended while others wait at a barrier");
    }
    release(0, grid_.threads);
  }

  void release(int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; ++i) {
      fibre(i).operands.call = Call::kNone;
      fibre(i).is_ready = true;
    }
  }

  void shuffle(int32_t first) {
    uint32_t values[kWarp];
    for (int32_t lane = 0; lane < kWarp; ++lane)
      values[lane] = operands(first + lane).value;
    for (int32_t lane = 0; lane < kWarp; ++lane) {
      Operands& mine = operands(first + lane);
      mine.value = values[(lane ^ mine.mask) % kWarp];
    }
  }

  // PTX ISA, ldmatrix .m8n8.x4: lane i names row i % 8 of matrix i / 8.
  void load(int32_t first, bool is_transposed) {
    for (int32_t lane = 0; lane < kWarp; ++lane) {
      for (int32_t matrix = 0; matrix < 4; ++matrix) {
        const auto element = [&](int32_t row, int32_t column) {
          const auto* from =
              static_cast<const unsigned char*>(operands(first + matrix * 8 + row).row);
          check_shared(from, 16);
          Bf16 value;
          std::memcpy(&value, from + 2 * column, sizeof value);
          return uint32_t{value};
        };
        const int32_t major = lane / 4;
        const int32_t minor = lane % 4 * 2;
        operands(first + lane).loaded[matrix] =
            is_transposed ? element(minor, major) | element(minor + 1, major) << 16
                          : element(major, minor) | element(major, minor + 1) << 16;
      }
    }
  }

  void check_shared(const unsigned char* address, size_t bytes) {
    if (address < shared() || address + bytes > shared_end())
      throw Violation("address outside of shared memory");
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
      throw Violation("address not aligned to 16 bytes");
  }

  // PTX ISA, mma .m16n8k16 .bf16 or .f16: gathers the operands by the fragment maps, multiplies,
  // scatters.
  void multiply_add(int32_t first, float (*widened)(uint16_t)) {
    float a[16][16];
    float b[16][8];
    for (int32_t lane = 0; lane < kWarp; ++lane) {
      const Operands& o = operands(first + lane);
      for (int32_t pair = 0; pair < 2; ++pair) {
        for (int32_t i = 0; i < 4; ++i)
          a[a_row(lane, i)][a_column(lane, i) + pair] = widened(half(o.a[i], pair));
        for (int32_t i = 0; i < 2; ++i)
          b[b_row(lane, i) + pair][b_column(lane)] = widened(half(o.b[i], pair));
      }
    }
    for (int32_t lane = 0; lane < kWarp; ++lane) {
      for (int32_t i = 0; i < 4; ++i) {
        float& c = operands(first + lane).c[i];
        for (int32_t k = 0; k < 16; ++k)
          c += a[c_row(lane, i)][k] * b[k][c_column(lane, i)];
      }
    }
  }

  const Grid& grid_;
  const int32_t x_;
  const int32_t y_;
  const std::function<void(const Thread&)>& body_;
  std::vector<Fibre> fibres_;
  std::vector<Words> shared_;
  std::mt19937 random_;
  std::vector<int32_t> lanes_;
  ucontext_t scheduler_ = {};
  int32_t unfinished_ = 0;
  std::exception_ptr error_;
};

int32_t Thread::count() const {
  return block_->grid().threads;
}
int32_t Thread::block_x() const {
  return block_->x();
}
int32_t Thread::block_y() const {
  return block_->y();
}
int32_t Thread::grid_x() const {
  return block_->grid().x;
}
unsigned char* Thread::shared_bytes() const {
  return block_->shared();
}

void Thread::wait_for_predecessor() const {
  block_->wait_for_predecessor(index_);
}

void Thread::sync() const {
  block_->wait(*this, {.call = Call::kSync});
}

void Thread::sync_warp() const {
  block_->wait(*this, {.call = Call::kSyncWarp});
}

float Thread::shuffle_xor(float value, int mask) const {
  block_->wait(*this, {.call = Call::kShuffle, .value = bits_of(value), .mask = mask});
  return float_of(block_->operands(index_).value);
}

int32_t Thread::shuffle_xor(int32_t value, int mask) const {
  block_->wait(*this,
               {.call = Call::kShuffle, .value = static_cast<uint32_t>(value), .mask = mask});
  return static_cast<int32_t>(block_->operands(index_).value);
}

uint32_t Thread::add(uint32_t* shared, uint32_t value) const {
  auto* bytes = reinterpret_cast<unsigned char*>(shared);
  if (bytes < block_->shared() || bytes + sizeof value > block_->shared_end())
    throw Violation("addition outside of shared memory");
  const uint32_t before = *shared;
  *shared += value;
  return before;
}

void Thread::copy_16(void* to, const void* from, bool is_valid) const {
  auto* bytes = static_cast<unsigned char*>(to);
  const bool is_inside = bytes >= block_->shared() && bytes + 16 <= block_->shared_end();
  const auto misalignment = (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from));
  if (!is_inside || misalignment % 16 != 0)
    throw Violation("copy to outside of shared memory, or not aligned to 16 bytes");
  Copy copy{.to = to, .bytes = {}, .group = block_->group(index_)};
  if (is_valid) {
    block_->expect_made(index_, from);
    std::memcpy(copy.bytes, from, sizeof copy.bytes);
  }
  // Until the wait its target holds neither the old bytes nor the new ones.
  std::memset(to, 0xff, sizeof copy.bytes);
  block_->copies(index_).push_back(copy);
}

void Thread::wait_for_copies() const {
  wait_for_copies_before(INT32_MAX);
}

void Thread::wait_for_copies_before(int32_t group) const {
  std::erase_if(block_->copies(index_), [&](const Copy& copy) {
    if (copy.group < group)
      std::memcpy(copy.to, copy.bytes, sizeof copy.bytes);
    return copy.group < group;
  });
}

void Thread::end_copies() const {
  ++block_->group(index_);
}

void Thread::wait_for_groups_but(int32_t count) const {
  wait_for_copies_before(block_->group(index_) - count);
}

void Thread::load_matrices(const void* row, uint32_t (&out)[4]) const {
  block_->wait(*this, {.call = Call::kLoad, .row = row, .loaded = out});
}

void Thread::load_matrices_transposed(const void* row, uint32_t (&out)[4]) const {
  block_->wait(*this, {.call = Call::kLoadTransposed, .row = row, .loaded = out});
}

void Thread::multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
  block_->wait(*this, {.call = Call::kMultiplyAdd, .c = c, .a = a, .b = {b0, b1}});
}

void Thread::multiply_add_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                              uint32_t b1) const {
  block_->wait(*this, {.call = Call::kMultiplyAddF16, .c = c, .a = a, .b = {b0, b1}});
}

void launch(const Grid& grid, const std::function<void(const Thread&)>& body) {
  if (grid.threads <= 0 || grid.threads % kWarp != 0)
    throw Violation("threads: got " + std::to_string(grid.threads) +
                    ", expected a positive multiple of 32");
  for (int32_t y = 0; y < grid.y; ++y) {
    for (int32_t x = 0; x < grid.x; ++x)
      Block(grid, x, y, body).run();
  }
}

}  // namespace flowprefill::simt
