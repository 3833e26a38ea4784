// CpuDevice: the synchronous device; owns how the compute team's threads are set up. Used by
// csrc/bindings.
#pragma once

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

  // Starts the compute team of the calling thread and gives its members their scheduling policy.
  void attach() override;

  const CpuDeviceOptions& options() const { return options_; }

 private:
  CpuDeviceOptions options_;
};

}  // namespace flowprefill
