// Prints what a boundary costs and how long a dispatch takes to be seen. Run by hand:
//   build/cpp/bench_boundary
#include <poll.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "runtime/clock.h"
#include "runtime/executor.h"

namespace flowprefill {
namespace {

// Segments that do nothing, or compute for about `busy_ns`.
class SpinProgram : public Program {
 public:
  SpinProgram(size_t size, int64_t busy_ns) : size_(size), busy_ns_(busy_ns) {}
  size_t size() const override { return size_; }
  SegmentLabel label(size_t) const override { return {.op = "spin"}; }
  void execute(size_t, const ExecutionContext&) override {
    if (busy_ns_ == 0) {
      return;
    }
    for (const int64_t end_ns = now_ns() + busy_ns_; now_ns() < end_ns;) {
    }
  }

 private:
  const size_t size_;
  const int64_t busy_ns_;
};

RunRef make(uint64_t id, size_t size, int64_t busy_ns) {
  return make_run(id, std::make_unique<SpinProgram>(size, busy_ns));
}

void wait_for_end(Executor& executor) {
  std::vector<Event> events;
  for (;;) {
    pollfd descriptor{.fd = executor.events().fd(), .events = POLLIN, .revents = 0};
    poll(&descriptor, 1, -1);
    executor.events().pop_all(events);
    if (std::any_of(events.begin(), events.end(), [](auto& e) { return is_terminal(e.kind); })) {
      return;
    }
  }
}

void print_percentiles(const char* what, std::vector<int64_t> times_ns) {
  std::sort(times_ns.begin(), times_ns.end());
  const auto at = [&](double share) {
    return static_cast<double>(
               times_ns[static_cast<size_t>(share * static_cast<double>(times_ns.size() - 1))]) /
           1e3;
  };
  std::printf("%-44s p50 %8.2f us   p99 %8.2f us   max %8.2f us\n", what, at(0.5), at(0.99),
              at(1.0));
}

void bench_boundary(Executor& executor) {
  constexpr size_t kSegments = 2'000'000;
  double best_ns = 1e9;
  for (int round = 0; round < 5; ++round) {
    const RunRef run = make(1, kSegments, 0);
    executor.dispatch(run);
    wait_for_end(executor);
    best_ns = std::min(best_ns, static_cast<double>(run->accounting().running_ns) / kSegments);
  }
  std::printf("%-44s %.1f ns (best of 5 x %zu empty segments)\n", "boundary", best_ns, kSegments);
}

void bench_dispatch(Executor& executor, int64_t busy_ns, const char* what) {
  constexpr int kRounds = 500;
  const RunRef background = make(1, busy_ns > 0 ? 10'000'000 : 0, busy_ns);
  std::vector<int64_t> blocking_ns;
  for (int round = 0; round < kRounds; ++round) {
    if (busy_ns > 0) {
      executor.dispatch(background);
    }
    std::this_thread::sleep_for(std::chrono::microseconds(500 + round % 97));
    const RunRef urgent = make(2, 1, 0);
    executor.dispatch(urgent);
    wait_for_end(executor);
    blocking_ns.push_back(urgent->accounting().last_blocking_ns);
  }
  executor.cancel(*background);
  if (busy_ns > 0) {
    wait_for_end(executor);
  }
  print_percentiles(what, std::move(blocking_ns));
}

}  // namespace
}  // namespace flowprefill

int main() {
  flowprefill::Executor executor(std::make_unique<flowprefill::Device>());
  executor.start();
  flowprefill::bench_boundary(executor);
  flowprefill::bench_dispatch(executor, 0, "dispatch to start, executor asleep");
  flowprefill::bench_dispatch(executor, 20'000, "dispatch to start, 20 us segments running");
  flowprefill::bench_dispatch(executor, 1'000'000, "dispatch to start, 1 ms segments running");
  return 0;
}
