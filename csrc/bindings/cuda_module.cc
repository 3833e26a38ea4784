// flowprefill._cuda: the native half of the engine on NVIDIA GPUs. See _cuda.pyi for the Python
// view. Importing it needs no driver: only what is called asks for one.
#include "bindings/module.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "FlowPrefill's native executor and models on NVIDIA GPUs.";
  flowprefill::bind_cuda_devices(m);
  flowprefill::bind_run_arguments(m);
  flowprefill::bind_cuda_model(m, flowprefill::bind_runtime(m));
}
