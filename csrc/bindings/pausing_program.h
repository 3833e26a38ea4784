// PausingProgram: a program that suspends its own run at chosen boundaries; made by Model.make_run
// for the tests that must stop a run at an exact place. Runs without such places never meet it.
#pragma once

#include <memory>
#include <unordered_set>
#include <utility>

#include "runtime/run.h"

namespace flowprefill {

class PausingProgram final : public Program {
 public:
  // boundaries: the segments before which the run stops as after suspend().
  PausingProgram(std::unique_ptr<Program> program, std::unordered_set<size_t> boundaries)
      : program_(std::move(program)), boundaries_(std::move(boundaries)) {}

  // The run that owns this program; before its dispatch.
  void attach(Run& run) { run_ = &run; }
  const Program& inner() const { return *program_; }

  size_t size() const override { return program_->size(); }
  SegmentLabel label(size_t i) const override { return program_->label(i); }
  size_t live_bytes(size_t cursor) const override { return program_->live_bytes(cursor); }

  void give_back_dead(size_t cursor) override { program_->give_back_dead(cursor); }

  void execute(size_t i, const ExecutionContext& context) override {
    program_->execute(i, context);
    if (boundaries_.contains(i + 1))
      run_->request_suspend();
  }

 private:
  const std::unique_ptr<Program> program_;
  const std::unordered_set<size_t> boundaries_;
  Run* run_ = nullptr;
};

inline RunRef make_pausing_run(uint64_t id, std::unique_ptr<Program> program,
                               const std::unordered_set<size_t>& boundaries) {
  if (boundaries.empty())
    return make_run(id, std::move(program));
  auto pausing = std::make_unique<PausingProgram>(std::move(program), boundaries);
  PausingProgram& attached = *pausing;
  RunRef run = make_run(id, std::move(pausing));
  attached.attach(*run);
  return run;
}

}  // namespace flowprefill
