// Team: the threads that share out one loop's items, the caller among them. The CPU device owns one
// and lends it to every segment; weights have one while they load.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace flowprefill {

// Puts the calling thread under SCHED_IDLE: it computes only where no other thread wants the core.
// Where the kernel refuses, everything stays as it was.
void enter_background();

// A loop shared out is a region. Items are claimed one by one, so a thread that the kernel
// deschedules holds back the item it has, and one that sleeps holds back nothing. Threads that wait
// spin for some microseconds, then sleep: an idle team takes no core from other threads.
//
// Threads: one caller at a time; the destructor too must not run during a region.
class Team {
 public:
  // Starts threads - 1 workers, named fp-compute. Throws std::invalid_argument unless threads >= 1,
  // std::system_error if a thread cannot be started.
  explicit Team(int threads, bool is_background = false);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Runs body(item) for every item in [0, items); returns when all are done. An exception in an
  // item skips the items not yet claimed and is rethrown here (the first one). Throws
  // std::logic_error if a region is running: called from an item, or by a second thread;
  // std::invalid_argument for 2^31 items or more.
  template <typename Body>
  void for_each(int64_t items, const Body& body) {
    run(items, {.call = [](const void* object,
                           int64_t item) { (*static_cast<const Body*>(object))(item); },
                .object = &body});
  }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Regions that the workers were called to. Thread: any.
  uint64_t num_regions() const { return num_regions_.load(std::memory_order_relaxed); }

 private:
  struct Body {
    void (*call)(const void* object, int64_t item);
    const void* object;
  };

  void run(int64_t items, Body body);
  void run_shared(int32_t items, Body body);
  void worker_main(bool is_background);
  void work();
  void call_workers();
  void stop();
  uint32_t wait_for_call(uint32_t seen);
  void wait_for_end();

  const pid_t process_ = getpid();
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> num_regions_{0};
  std::atomic<bool> is_used_{false};
  std::atomic<bool> is_stopped_{false};

  // The region. Written by the caller before unclaimed_; a worker reads it once it has claimed an
  // item, and the region lives on at least until that item is done.
  Body body_{};
  int32_t items_ = 0;
  std::atomic<bool> is_failed_{false};
  std::exception_ptr error_;

  // Each on a cache line of its own: one is written per item, one per thread and region, and one is
  // what idle workers look at.
  alignas(64) std::atomic<int32_t> unclaimed_{0};  // <= 0: nothing to claim
  alignas(64) std::atomic<int32_t> unfinished_{0};
  std::atomic<bool> is_caller_asleep_{false};
  alignas(64) std::atomic<uint32_t> calls_{0};  // a change calls the workers
  std::atomic<int32_t> num_asleep_{0};
};

}  // namespace flowprefill
