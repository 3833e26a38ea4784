// Checks and converts what Python gives to models and runs: arrays, shapes, plans, batches. Called
// by cpu_model.cc and cuda_model.cc; knows neither device.
#pragma once

#include <string>
#include <vector>

#include "bindings/module.h"
#include "graph/batch.h"
#include "graph/planner.h"

namespace flowprefill {

template <typename E>
using Array = pybind11::array_t<E, pybind11::array::c_style | pybind11::array::forcecast>;

// One weight: float32, row-major. `values` belongs to the array, which `owner` keeps alive.
struct TensorView {
  Array<float> owner;
  const float* values = nullptr;
  int64_t rows = 0;
  int64_t columns = 1;  // of vectors: 1
};

// All of these throw std::invalid_argument naming the field, what was given and what is allowed.
// The GIL is held.

// Takes an array of float32 with one or two dimensions.
TensorView tensor_from(const std::string& name, const pybind11::handle& value);
// Without threads and element_bytes, which the model knows.
PlanOptions options_from(const pybind11::dict& values);
// tokens: array of int32. sequences: (rows, context, block table) each.
Batch batch_from(const pybind11::object& tokens, const pybind11::list& sequences);

// An integer, number, string or list from a dict.
template <typename V>
V get(const pybind11::dict& values, const char* key) {
  if (!values.contains(key))
    throw std::invalid_argument(std::string(key) + ": missing");
  const pybind11::object value = values[key];
  try {
    return value.cast<V>();
  } catch (const pybind11::cast_error&) {
    throw std::invalid_argument(std::string(key) + ": got " + std::string(pybind11::repr(value)) +
                                ", which has the wrong type or range");
  }
}

}  // namespace flowprefill
