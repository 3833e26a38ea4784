// Mailbox: the one word between dispatch() and the executor's loop. Putting a run into it is the
// preemption signal.
#pragma once

#include <atomic>
#include <cstdint>

#include "runtime/ref.h"

namespace flowprefill {

// Holds nothing, one run (with a reference), or the mark that it is closed for good.
//
// put, take and close are lock-free and may be called from any thread; wait is for the one reader.
class Mailbox {
 public:
  enum class Delivery { kPut, kClosed };

  Mailbox() = default;
  ~Mailbox();
  Mailbox(const Mailbox&) = delete;
  Mailbox& operator=(const Mailbox&) = delete;

  // Exchanges the content for `run` (null: empties it). On return `run` is what was displaced, or
  // unchanged if the mailbox is closed. The last writer wins.
  Delivery put(RunRef& run) noexcept;

  // Takes the run out; null if there is none or the mailbox is closed.
  RunRef take() noexcept;

  // Empties it if it holds exactly this run; whether it did. So a cancelled run's last reference
  // isn't left to the executor.
  bool remove(const Run& run) noexcept;

  // Closes it; returns the run that was in it. Every later put() is refused.
  RunRef close() noexcept;

  // One acquire load: whether there is a run or the closed mark. The executor's only look at each
  // boundary.
  bool has_mail() const noexcept { return word_.load(std::memory_order_acquire) != nullptr; }
  bool is_closed() const noexcept { return word_.load(std::memory_order_acquire) == closed(); }

  // Sleeps until has_mail().
  void wait() const noexcept;

 private:
  // An address no run can have: run pointers are aligned to more than one byte.
  static Run* closed() noexcept { return reinterpret_cast<Run*>(uintptr_t{1}); }

  // Its own cache line: the executor reads it at every boundary, others write it rarely.
  alignas(64) std::atomic<Run*> word_{nullptr};
  // Counts what came, to sleep on: who sleeps on a word of 8 bytes shares a place with all others
  // of the process, and every dispatch would wake the executors of other engines.
  std::atomic<uint32_t> arrivals_{0};
};

}  // namespace flowprefill
