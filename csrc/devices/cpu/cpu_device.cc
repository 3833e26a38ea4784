#include "devices/cpu/cpu_device.h"

#include <stdexcept>
#include <string>

namespace flowprefill {

CpuDevice::CpuDevice(CpuDeviceOptions options) : options_(options) {
  if (options_.threads < 1) {
    throw std::invalid_argument("threads: got " + std::to_string(options_.threads) +
                                ", expected at least 1");
  }
}

void CpuDevice::attach() {
  team_ = std::make_unique<Team>(options_.threads, options_.is_background);
  if (options_.is_background)
    enter_background();
}

void CpuDevice::detach() noexcept {
  team_.reset();
}

void CpuDevice::launch(Program& program, size_t i) {
  program.execute(i, {.team = team_.get()});
  num_regions_.store(team_->num_regions(), std::memory_order_relaxed);
}

}  // namespace flowprefill
