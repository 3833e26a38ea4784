// Binds the planner without weights or device: how it would cut a batch, in predicted seconds.
// The simulator calls it.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/graph_arguments.h"
#include "bindings/module.h"
#include "devices/cuda/backend/cuda_cuts.h"
#include "graph/planner.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

int32_t positive(const char* name, const py::object& value) {
  const auto number = value_from<int32_t>(name, value);
  if (number < 1) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(number) +
                                ", expected at least 1");
  }
  return number;
}

AttentionSlices attention_slices_from(const py::object& object) {
  const auto name = value_from<std::string>("attention_slices", object);
  if (name == "rows")
    return AttentionSlices::kRows;
  if (name == "heads_first")
    return AttentionSlices::kHeadsFirst;
  if (name == "rows_first")
    return AttentionSlices::kRowsFirst;
  throw std::invalid_argument("attention_slices: got " + name +
                              ", expected rows, heads_first or rows_first");
}

CutRules make_cuts(const py::object& row_step, const py::object& max_tile_rows,
                   const py::object& min_tile_rows, const py::object& min_product_parts,
                   const py::object& attention_slices, const py::object& slices_products,
                   const py::object& embed_rows, const py::object& weight_element_bytes,
                   const py::object& embed_row_s) {
  return {.row_step = positive("row_step", row_step),
          .max_tile_rows = positive("max_tile_rows", max_tile_rows),
          .min_tile_rows = positive("min_tile_rows", min_tile_rows),
          .min_product_parts = positive("min_product_parts", min_product_parts),
          .attention_slices = attention_slices_from(attention_slices),
          .slices_products = value_from<bool>("slices_products", slices_products),
          .embed_rows = positive("embed_rows", embed_rows),
          .costs = {.weight_element_bytes = positive("weight_element_bytes", weight_element_bytes),
                    .embed_row_s = value_from<double>("embed_row_s", embed_row_s)}};
}

class PlanPredictor {
 public:
  PlanPredictor(const py::object& graph, CutRules cuts) : graph_(graph_from(graph)), cuts_(cuts) {}

  // Predicted seconds of each segment of one prompt of `rows` tokens on `context` cached ones.
  py::array_t<double> segments(const py::object& rows, const py::object& context,
                               const PlanOptions& options) const {
    Batch batch;
    batch.tokens.resize(static_cast<size_t>(positive("rows", rows)));
    Sequence sequence;
    sequence.rows = batch.rows();
    sequence.context = value_from<int32_t>("context", context);
    if (sequence.context < 0) {
      throw std::invalid_argument("context: got " + std::to_string(sequence.context) +
                                  ", expected 0 or more");
    }
    batch.sequences.push_back(std::move(sequence));
    const Plan plan = make_plan(graph_, batch, options, cuts_);
    py::array_t<double> seconds(static_cast<py::ssize_t>(plan.size()));
    double* values = seconds.mutable_data();
    for (size_t i = 0; i < plan.size(); ++i) {
      values[i] = 0.0;
      for (const Step& step : plan.segment(i))
        values[i] += step.predicted_s;
    }
    return seconds;
  }

 private:
  const ModelGraph graph_;
  const CutRules cuts_;
};

}  // namespace

void bind_planner(py::module_& m) {
  const CutRules usual;
  py::class_<CutRules>(m, "CutRules", py::module_local())
      .def(py::init(&make_cuts), py::kw_only(), py::arg("row_step") = usual.row_step,
           py::arg("max_tile_rows") = usual.max_tile_rows,
           py::arg("min_tile_rows") = usual.min_tile_rows,
           py::arg("min_product_parts") = usual.min_product_parts,
           py::arg("attention_slices") = "heads_first",
           py::arg("slices_products") = usual.slices_products,
           py::arg("embed_rows") = usual.embed_rows,
           py::arg("weight_element_bytes") = usual.costs.weight_element_bytes,
           py::arg("embed_row_s") = usual.costs.embed_row_s);
  m.def("cuda_cuts", [] { return kCudaCuts; });
  py::class_<PlanPredictor>(m, "PlanPredictor", py::module_local())
      .def(py::init<const py::object&, CutRules>(), py::arg("graph"), py::arg("cuts"))
      .def("segments", &PlanPredictor::segments, py::arg("rows"), py::arg("context"),
           py::arg("plan"));
}

}  // namespace flowprefill
