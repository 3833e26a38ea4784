// ScriptedProgram: a program whose segments call a function of the test; used by every test here.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <utility>

#include "runtime/clock.h"
#include "runtime/run.h"

// Races are repeated less often where a sanitizer slows each try down.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define FP_STRESS_DIVISOR 5
#else
#define FP_STRESS_DIVISOR 1
#endif

namespace flowprefill::testing {

constexpr int kTimeoutMs = 100'000;  // for a bug that would hang; nothing waits this long otherwise

// Counts the repetitions of a race: `most`, or one and as many more as 20 s allow. Threads that
// yield to each other take turns in microseconds, or in tens of milliseconds where others compute.
class Rounds {
 public:
  explicit Rounds(int most) : most_(most / FP_STRESS_DIVISOR) {}

  // Whether there is another one.
  bool next() {
    const bool has_time = now_ns() - start_ns_ < 20'000'000'000;
    if (num_ > 0 && (num_ >= most_ || !has_time))
      return false;
    ++num_;
    return true;
  }
  int index() const { return num_ - 1; }

 private:
  const int most_;
  const int64_t start_ns_ = now_ns();
  int num_ = 0;
};

// Counts its living instances, so that a test can show that every run was freed.
class ScriptedProgram : public Program {
 public:
  using Script = std::function<void(size_t)>;

  ScriptedProgram(std::atomic<int>& num_alive, size_t size, Script script = {})
      : num_alive_(num_alive), size_(size), script_(std::move(script)) {
    ++num_alive_;
  }
  ~ScriptedProgram() override { --num_alive_; }

  size_t size() const override { return size_; }
  SegmentLabel label(size_t i) const override {
    const auto row = static_cast<int32_t>(16 * i);
    return {.op = "attention",
            .layer = static_cast<int32_t>(i),
            .last_layer = static_cast<int32_t>(i),
            .row_begin = row,
            .row_end = row + 16,
            .predicted_s = 0.5};
  }
  void execute(size_t i, const ExecutionContext&) override {
    if (script_) {
      script_(i);
    }
  }

 private:
  std::atomic<int>& num_alive_;
  const size_t size_;
  const Script script_;
};

inline RunRef scripted_run(std::atomic<int>& num_alive, uint64_t id, size_t size,
                           ScriptedProgram::Script script = {}) {
  return make_run(id, std::make_unique<ScriptedProgram>(num_alive, size, std::move(script)));
}

}  // namespace flowprefill::testing
