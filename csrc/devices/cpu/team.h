// The compute team: the OpenMP threads that torch's own operators use, so that a process has one
// pool only. Called on the executor thread. Items are claimed one by one, so a worker that the
// kernel deschedules holds back one item, not its whole share.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace flowprefill {

// Runs body(item) for every item in [0, items) on `threads` threads; returns when all are done.
// An exception in an item skips the items not yet claimed and is rethrown here (the first one).
template <typename Body>
void team_for(int threads, int64_t items, const Body& body) {
  if (threads == 1 || items == 1) {
    for (int64_t i = 0; i < items; ++i)
      body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::atomic<bool> is_failed{false};
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  {
    try {
      for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < items;
           i = next.fetch_add(1, std::memory_order_relaxed)) {
        body(i);
      }
    } catch (...) {
      next.store(items, std::memory_order_relaxed);
      if (!is_failed.exchange(true))
        error = std::current_exception();
    }
  }
  if (error)
    std::rethrow_exception(error);
}

}  // namespace flowprefill
