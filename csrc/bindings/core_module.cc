// flowprefill._core: the native half of the engine on the CPU. See _core.pyi for the Python view.
#include "bindings/module.h"
#include "devices/cpu/cpu_device.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

std::unique_ptr<Executor> make_executor(int threads, bool background) {
  return std::make_unique<Executor>(
      std::make_unique<CpuDevice>(CpuDeviceOptions{threads, background}));
}

// Every executor of this module has a CpuDevice.
uint64_t num_regions(const Executor& executor) {
  return static_cast<const CpuDevice&>(executor.device()).num_regions();
}

}  // namespace
}  // namespace flowprefill

PYBIND11_MODULE(_core, m) {
  m.doc() = "FlowPrefill's native executor, models and operators.";
  flowprefill::bind_runtime(m)
      .def(py::init(&flowprefill::make_executor), py::arg("threads"), py::arg("background") = false)
      .def_property_readonly("num_regions", &flowprefill::num_regions);
  flowprefill::bind_run_arguments(m);
  flowprefill::bind_cpu_model(m);
  flowprefill::bind_planner(m);
}
