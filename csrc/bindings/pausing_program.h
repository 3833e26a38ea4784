// PausingProgram: a program that suspends its own run at chosen boundaries; made by Model.make_run
// for the tests that must stop a run at an exact place. Runs without such places never meet it.
#pragma once

#include <memory>
#include <unordered_set>
#include <utility>

#include "model/transformer_program.h"
#include "runtime/run.h"

namespace flowprefill {

class PausingProgram final : public LogitsProgram {
 public:
  // boundaries: the segments before which the run stops as if somebody had called suspend().
  PausingProgram(std::unique_ptr<LogitsProgram> program, std::unordered_set<size_t> boundaries)
      : program_(std::move(program)), boundaries_(std::move(boundaries)) {}

  // The run that owns this program; before its dispatch.
  void attach(Run& run) { run_ = &run; }

  size_t size() const override { return program_->size(); }
  SegmentLabel label(size_t i) const override { return program_->label(i); }
  size_t live_bytes(size_t cursor) const override { return program_->live_bytes(cursor); }
  const float* logits() const override { return program_->logits(); }
  int32_t num_sequences() const override { return program_->num_sequences(); }
  int32_t vocab_size() const override { return program_->vocab_size(); }
  size_t workspace_bytes() const override { return program_->workspace_bytes(); }

  void execute(size_t i) override {
    program_->execute(i);
    if (boundaries_.contains(i + 1))
      run_->request_suspend();
  }

 private:
  const std::unique_ptr<LogitsProgram> program_;
  const std::unordered_set<size_t> boundaries_;
  Run* run_ = nullptr;
};

}  // namespace flowprefill
