// What the binding files share: one function per subject, called by module.cc. The only folder that
// knows Python.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "runtime/run.h"

PYBIND11_DECLARE_HOLDER_TYPE(T, flowprefill::Ref<T>, true)

namespace flowprefill {

void bind_runtime(pybind11::module_& m);
void bind_model(pybind11::module_& m);

}  // namespace flowprefill
