// ScriptedProgram: a program whose segments call a function of the test; used by every test here.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>
#include <utility>

#include "runtime/run.h"

// Races are repeated less often where a sanitizer slows each try down.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define FP_STRESS_DIVISOR 5
#else
#define FP_STRESS_DIVISOR 1
#endif

namespace flowprefill::testing {

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
