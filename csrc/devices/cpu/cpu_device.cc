#include "devices/cpu/cpu_device.h"

#include <omp.h>
#include <sched.h>

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
  omp_set_num_threads(options_.threads);
#pragma omp parallel num_threads(options_.threads)
  {
    if (options_.is_background) {
      const sched_param parameters{};
      sched_setscheduler(0, SCHED_IDLE, &parameters);  // refused at worst: then as without
    }
  }
}

}  // namespace flowprefill
