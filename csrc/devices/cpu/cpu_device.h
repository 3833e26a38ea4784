// CpuDevice: the synchronous device; owns the threads that compute. Used by csrc/bindings.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "devices/cpu/team.h"
#include "runtime/device.h"

namespace flowprefill {

struct CpuDeviceOptions {
  int threads = 1;
  // Run the team under SCHED_IDLE: the control plane never waits for a scheduler slice, but any
  // other process of the machine goes first too.
  bool is_background = false;
};

class CpuDevice final : public Device {
 public:
  // Throws std::invalid_argument unless threads >= 1.
  explicit CpuDevice(CpuDeviceOptions options);

  // Starts the team: the calling thread and threads - 1 workers. They end in detach().
  void attach() override;
  void detach() noexcept override;
  void launch(Program& program, size_t i) override;

  const CpuDeviceOptions& options() const { return options_; }

  // Loops that the team has shared out in all segments executed so far. Thread: any.
  uint64_t num_regions() const { return num_regions_.load(std::memory_order_relaxed); }

 private:
  CpuDeviceOptions options_;
  std::unique_ptr<Team> team_;
  std::atomic<uint64_t> num_regions_{0};
};

}  // namespace flowprefill
