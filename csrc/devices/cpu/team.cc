#include "devices/cpu/team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/own_thread.h"

namespace flowprefill {
namespace {

// Longer than nearly all waits inside a run, where one thread still has its last item. With 50 a
// wait in forty ends asleep, with 100 one in a hundred; nothing gets faster beyond 20.
constexpr std::chrono::microseconds kSpin{100};
constexpr int kPausesPerYield = 32;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether is_over() came true within kSpin. A thread that waits has nothing to do, so it offers its
// core to others all the time: the control plane gets in as if this one slept.
template <typename Condition>
bool spin_until(const Condition& is_over) {
  if (is_over())
    return true;
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < kPausesPerYield; ++i) {
      pause();
      if (is_over())
        return true;
    }
    sched_yield();
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Sleeps while the word has this value; may return early.
template <typename Word>
void futex_wait(std::atomic<Word>& word, Word value) {
  static_assert(sizeof(word) == 4 && std::atomic<Word>::is_always_lock_free);
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

template <typename Word>
void futex_wake_all(std::atomic<Word>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, std::numeric_limits<int>::max(), nullptr, nullptr,
          0);
}

// Refuses a second user as long as it lives.
class Use {
 public:
  explicit Use(std::atomic<bool>& is_used) : is_used_(is_used) {
    if (is_used_.exchange(true, std::memory_order_acquire))
      throw std::logic_error("team: for_each() while a region is running");
  }
  ~Use() { is_used_.store(false, std::memory_order_release); }
  Use(const Use&) = delete;
  Use& operator=(const Use&) = delete;

 private:
  std::atomic<bool>& is_used_;
};

}  // namespace

void enter_background() {
  const sched_param parameters{};
  sched_setscheduler(0, SCHED_IDLE, &parameters);
}

Team::Team(int threads, bool is_background) {
  if (threads < 1)
    throw std::invalid_argument("threads: got " + std::to_string(threads) +
                                ", expected at least 1");
  workers_.reserve(static_cast<size_t>(threads) - 1);
  try {
    for (int i = 1; i < threads; ++i)
      workers_.emplace_back([this, is_background] { worker_main(is_background); });
  } catch (...) {
    stop();
    throw;
  }
}

Team::~Team() {
  stop();
}

void Team::stop() {
  is_stopped_.store(true, std::memory_order_relaxed);  // seen with the call
  call_workers();
  for (std::thread& worker : workers_)
    join_own(worker, process_);
}

void Team::run(int64_t items, Body body) {
  const Use use(is_used_);
  if (workers_.empty() || items <= 1) {
    for (int64_t i = 0; i < items; ++i)
      body.call(body.object, i);
    return;
  }
  if (items > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("items: got " + std::to_string(items) + ", expected below 2^31");
  run_shared(static_cast<int32_t>(items), body);
}

void Team::run_shared(int32_t items, Body body) {
  body_ = body;
  items_ = items;
  unfinished_.store(items, std::memory_order_relaxed);
  unclaimed_.store(items, std::memory_order_release);
  num_regions_.fetch_add(1, std::memory_order_relaxed);
  call_workers();
  work();
  wait_for_end();
  if (!is_failed_.load(std::memory_order_relaxed))
    return;
  is_failed_.store(false, std::memory_order_relaxed);
  std::rethrow_exception(std::exchange(error_, nullptr));
}

// Claims items of the region that is running now until there are none. The caller cannot begin
// another one while this thread has items that it has not taken from unfinished_.
void Team::work() {
  int32_t done = 0;
  for (;;) {
    const int32_t unclaimed = unclaimed_.fetch_sub(1, std::memory_order_acq_rel);
    if (unclaimed <= 0)
      break;
    try {
      body_.call(body_.object, items_ - unclaimed);
    } catch (...) {
      if (!is_failed_.exchange(true, std::memory_order_relaxed))
        error_ = std::current_exception();
      done += std::max(0, unclaimed_.exchange(0, std::memory_order_acq_rel));
    }
    ++done;
  }
  if (done == 0 || unfinished_.fetch_sub(done) != done)
    return;
  if (is_caller_asleep_.load())
    futex_wake_all(unfinished_);
}

void Team::worker_main(bool is_background) {
  pthread_setname_np(pthread_self(), "fp-compute");
  if (is_background)
    enter_background();
  uint32_t seen = 0;
  for (;;) {
    seen = wait_for_call(seen);
    if (is_stopped_.load(std::memory_order_relaxed))
      return;
    work();
  }
}

// Here and in the waits below, sequential consistency sees to it that either the waiting thread
// finds the word changed or the other one finds it asleep.
void Team::call_workers() {
  calls_.fetch_add(1);
  if (num_asleep_.load() > 0)
    futex_wake_all(calls_);
}

// Returns the number of calls, once it is no longer `seen`.
uint32_t Team::wait_for_call(uint32_t seen) {
  const auto is_called = [&] { return calls_.load(std::memory_order_acquire) != seen; };
  if (!spin_until(is_called)) {
    num_asleep_.fetch_add(1);
    while (calls_.load() == seen)
      futex_wait(calls_, seen);
    num_asleep_.fetch_sub(1);
  }
  return calls_.load(std::memory_order_acquire);
}

void Team::wait_for_end() {
  const auto is_over = [&] { return unfinished_.load(std::memory_order_acquire) == 0; };
  if (spin_until(is_over))
    return;
  is_caller_asleep_.store(true);
  for (int32_t left = unfinished_.load(); left != 0; left = unfinished_.load())
    futex_wait(unfinished_, left);
  is_caller_asleep_.store(false, std::memory_order_relaxed);
}

}  // namespace flowprefill
