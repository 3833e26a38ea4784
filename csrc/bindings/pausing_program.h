// PausingProgram: a program that suspends its own run at chosen boundaries, or fails at a chosen
// segment; made by Model.make_run for the tests that must stop a run at an exact place. Runs
// without such places never meet it.
#pragma once

#include <memory>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "runtime/run.h"

namespace flowprefill {

class PausingProgram final : public Program {
 public:
  // boundaries: the segments before which the run stops as if somebody had called suspend().
  // fail_at: the segment that throws instead of being executed; -1: none.
  PausingProgram(std::unique_ptr<Program> program, std::unordered_set<size_t> boundaries,
                 int64_t fail_at)
      : program_(std::move(program)), boundaries_(std::move(boundaries)), fail_at_(fail_at) {}

  // The run that owns this program; before its dispatch.
  void attach(Run& run) { run_ = &run; }
  const Program& inner() const { return *program_; }

  size_t size() const override { return program_->size(); }
  SegmentLabel label(size_t i) const override { return program_->label(i); }
  size_t live_bytes(size_t cursor) const override { return program_->live_bytes(cursor); }

  void execute(size_t i) override {
    if (static_cast<int64_t>(i) == fail_at_)
      throw std::runtime_error(std::string("injected failure in ") + label(i).op);
    program_->execute(i);
    if (boundaries_.contains(i + 1))
      run_->request_suspend();
  }

 private:
  const std::unique_ptr<Program> program_;
  const std::unordered_set<size_t> boundaries_;
  const int64_t fail_at_;
  Run* run_ = nullptr;
};

inline RunRef make_pausing_run(uint64_t id, std::unique_ptr<Program> program,
                               const std::unordered_set<size_t>& boundaries, int64_t fail_at = -1) {
  if (boundaries.empty() && fail_at < 0)
    return make_run(id, std::move(program));
  auto pausing = std::make_unique<PausingProgram>(std::move(program), boundaries, fail_at);
  PausingProgram& attached = *pausing;
  RunRef run = make_run(id, std::move(pausing));
  attached.attach(*run);
  return run;
}

}  // namespace flowprefill
