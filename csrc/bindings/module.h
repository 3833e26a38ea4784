// What the binding files share: one function per subject, called by core_module.cc and
// cuda_module.cc. The only folder that knows Python.
//
// Both modules compile the same source of runs and executors, each with a copy of csrc/runtime of
// its own. So every class is local to its module, and a run goes back only into the module that
// made it: own_run() checks that, for pybind11 alone would let a run of the same C++ class through.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "runtime/executor.h"
#include "runtime/run.h"

PYBIND11_DECLARE_HOLDER_TYPE(T, flowprefill::Ref<T>, true)

namespace flowprefill {

// Binds Run, Executor, what they tell of themselves, spin_run and now_s. The caller adds the
// Executor's constructor, which knows the device.
pybind11::class_<Executor> bind_runtime(pybind11::module_& m);
// Binds the values that runs are made of.
void bind_run_arguments(pybind11::module_& m);
void bind_cpu_model(pybind11::module_& m);
// Binds PlanPredictor, after bind_run_arguments().
void bind_planner(pybind11::module_& m);
// Adds the constructor of `executor` too.
void bind_cuda_model(pybind11::module_& m, pybind11::class_<Executor> executor);
void bind_cuda_devices(pybind11::module_& m);

// The run in a Python object. Throws TypeError if it is none, or one of the other module.
Run& own_run(const pybind11::handle& object);

// A run's program without what make_pausing_run() put around it.
const Program& program_of(const Run& run);

// The program of a finished run whose result is wanted. `what` it gives: in the errors. Throws
// std::invalid_argument if the program has no such result, or the run is in another state.
template <typename P>
const P& finished(const pybind11::handle& object, const char* what) {
  const Run& run = own_run(object);
  const auto* program = dynamic_cast<const P*>(&program_of(run));
  if (program == nullptr)
    throw std::invalid_argument(std::string("run: has no ") + what);
  if (run.state() != RunState::kFinished) {
    throw std::invalid_argument(std::string("run: is ") + to_string(run.state()) + ", " + what +
                                " exist once it has finished");
  }
  return *program;
}

}  // namespace flowprefill
