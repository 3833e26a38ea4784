// Checks and converts what Python gives to models and runs: arrays, shapes, numbers. Called by
// run_arguments.cc, cpu_model.cc and cuda_model.cc; knows neither device.
#pragma once

#include <string>
#include <vector>

#include "bindings/module.h"

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
// Weights in blocks are rows and their bytes: two dimensions.
void check_block_rows(const std::string& name, const Array<uint8_t>& rows);
// Takes an array of int32 with one dimension.
std::vector<int32_t> ids_from(const std::string& name, const pybind11::handle& value);

// An integer, number, string or list.
template <typename V>
V value_from(const std::string& name, const pybind11::handle& value) {
  try {
    return value.cast<V>();
  } catch (const pybind11::cast_error&) {
    throw std::invalid_argument(name + ": got " + std::string(pybind11::repr(value)) +
                                ", which has the wrong type or range");
  }
}

// The same from a dict.
template <typename V>
V get(const pybind11::dict& values, const char* key) {
  if (!values.contains(key))
    throw std::invalid_argument(std::string(key) + ": missing");
  return value_from<V>(key, values[key]);
}

}  // namespace flowprefill
