// flowprefill._core: the native half of the engine. See _core.pyi for the Python view.
#include "bindings/module.h"

PYBIND11_MODULE(_core, m) {
  m.doc() = "FlowPrefill's native executor, models and operators.";
  flowprefill::bind_runtime(m);
  flowprefill::bind_model(m);
}
