#include "bindings/arguments.h"

#include <cmath>
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

std::vector<int32_t> ids_of(const std::string& name, const py::handle& value) {
  const auto array = array_of<int32_t>(name, value);
  if (array.ndim() != 1) {
    throw std::invalid_argument(name + ": got " + std::to_string(array.ndim()) +
                                " dimensions, expected 1");
  }
  return {array.data(), array.data() + array.size()};
}

double get_positive(const py::dict& values, const char* key) {
  const auto number = get<double>(values, key);
  if (!(std::isfinite(number) && number > 0)) {
    throw std::invalid_argument(std::string(key) + ": got " + std::to_string(number) +
                                ", expected a number > 0");
  }
  return number;
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

PlanOptions options_from(const py::dict& d) {
  PlanOptions o;
  const auto kind = get<std::string>(d, "granularity");
  if (kind == "none")
    o.granularity = Granularity::kNone;
  else if (kind == "layer")
    o.granularity = Granularity::kLayer;
  else if (kind == "operator")
    o.granularity = Granularity::kOperator;
  else if (kind == "chunk")
    o.granularity = Granularity::kChunk;
  else if (kind == "budget")
    o.granularity = Granularity::kBudget;
  else
    throw std::invalid_argument("granularity: got " + kind +
                                ", expected none, layer, operator, chunk or budget");
  o.budget_s = get_positive(d, "budget_s");
  o.chunk_tokens = get<int32_t>(d, "chunk_tokens");
  if (o.chunk_tokens < 1) {
    throw std::invalid_argument("chunk_tokens: got " + std::to_string(o.chunk_tokens) +
                                ", expected at least 1");
  }
  o.rates.gemm_flops_per_s = get_positive(d, "gemm_flops_per_s");
  o.rates.attention_flops_per_s = get_positive(d, "attention_flops_per_s");
  o.rates.weight_bytes_per_s = get_positive(d, "weight_bytes_per_s");
  o.rates.step_overhead_s = get<double>(d, "step_overhead_s");
  return o;
}

Batch batch_from(const py::object& tokens, const py::list& sequences) {
  Batch batch;
  batch.tokens = ids_of("tokens", tokens);
  int32_t row = 0;
  for (const py::handle item : sequences) {
    const std::string name = "sequence " + std::to_string(batch.sequences.size());
    if (!py::isinstance<py::tuple>(item) || py::len(item) != 3) {
      throw std::invalid_argument(name + ": expected a tuple of rows, context and block table");
    }
    const auto entry = py::reinterpret_borrow<py::tuple>(item);
    Sequence s;
    s.row_begin = row;
    try {
      s.rows = entry[0].cast<int32_t>();
      s.context = entry[1].cast<int32_t>();
    } catch (const py::cast_error&) {
      throw std::invalid_argument(name + ": rows and context: expected integers");
    }
    if (s.rows < 1 || s.rows > batch.rows() - row) {
      throw std::invalid_argument(name + ": got " + std::to_string(s.rows) + " rows, expected 1.." +
                                  std::to_string(batch.rows() - row) +
                                  ", those left of the tokens");
    }
    s.block_table = ids_of(name + ": block table", entry[2]);
    row += s.rows;
    batch.sequences.push_back(std::move(s));
  }
  return batch;
}

}  // namespace flowprefill
