#include "bindings/arguments.h"

#include <utility>

namespace py = pybind11;

namespace flowprefill {
namespace {

// Takes arrays of exactly this element type: a silent conversion would cut ids or compute on
// rounded weights.
template <typename E>
Array<E> array_of(const std::string& name, const py::handle& value) {
  const char* wanted = std::is_same_v<E, float> ? "float32" : "int32";
  if (!py::isinstance<py::array>(value)) {
    throw std::invalid_argument(name + ": got " +
                                std::string(py::str(py::type::of(value).attr("__name__"))) +
                                ", expected an array of " + wanted);
  }
  const auto array = py::reinterpret_borrow<py::array>(value);
  if (!array.dtype().is(py::dtype::of<E>()) && !array.dtype().equal(py::dtype::of<E>())) {
    throw std::invalid_argument(name + ": got an array of " + std::string(py::str(array.dtype())) +
                                ", expected " + wanted);
  }
  return Array<E>(array);
}

}  // namespace

TensorView tensor_from(const std::string& name, const py::handle& value) {
  auto array = array_of<float>("tensor " + name, value);
  if (array.ndim() != 1 && array.ndim() != 2) {
    throw std::invalid_argument("tensor " + name + ": got " + std::to_string(array.ndim()) +
                                " dimensions, expected 1 or 2");
  }
  const int64_t columns = array.ndim() == 2 ? array.shape(1) : 1;
  const int64_t rows = array.shape(0);
  const float* values = array.data();
  return {std::move(array), values, rows, columns};
}

void check_block_rows(const std::string& name, const Array<uint8_t>& rows) {
  if (rows.ndim() != 2) {
    throw std::invalid_argument("tensor " + name + ": got " + std::to_string(rows.ndim()) +
                                " dimensions, expected 2: rows and their bytes");
  }
}

std::vector<int32_t> ids_from(const std::string& name, const py::handle& value) {
  const auto array = array_of<int32_t>(name, value);
  if (array.ndim() != 1) {
    throw std::invalid_argument(name + ": got " + std::to_string(array.ndim()) +
                                " dimensions, expected 1");
  }
  return {array.data(), array.data() + array.size()};
}

}  // namespace flowprefill
