// Binds what a run is made of: MachineRates, PlanOptions, BatchSequence, Batch, DeviceSampling.
// Plain values that Python fills in by name and both modules take.
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/module.h"
#include "graph/batch.h"
#include "graph/planner.h"
#include "graph/sampling_params.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

double positive(const char* name, const py::object& value) {
  const auto number = value_from<double>(name, value);
  if (!(std::isfinite(number) && number > 0)) {
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(number) +
                                ", expected a number > 0");
  }
  return number;
}

Granularity granularity_from(const std::string& name) {
  if (name == "none")
    return Granularity::kNone;
  if (name == "layer")
    return Granularity::kLayer;
  if (name == "operator")
    return Granularity::kOperator;
  if (name == "chunk")
    return Granularity::kChunk;
  if (name == "budget")
    return Granularity::kBudget;
  throw std::invalid_argument("granularity: got " + name +
                              ", expected none, layer, operator, chunk or budget");
}

MachineRates make_rates(const py::object& gemm_flops_per_s, const py::object& attention_flops_per_s,
                        const py::object& weight_bytes_per_s, const py::object& step_overhead_s,
                        const py::object& cache_bytes_per_s) {
  const py::object& cache = cache_bytes_per_s.is_none() ? weight_bytes_per_s : cache_bytes_per_s;
  return {.gemm_flops_per_s = positive("gemm_flops_per_s", gemm_flops_per_s),
          .attention_flops_per_s = positive("attention_flops_per_s", attention_flops_per_s),
          .weight_bytes_per_s = positive("weight_bytes_per_s", weight_bytes_per_s),
          .step_overhead_s = positive("step_overhead_s", step_overhead_s),
          .cache_bytes_per_s = positive("cache_bytes_per_s", cache)};
}

PlanOptions make_options(const py::object& granularity, const MachineRates& rates,
                         const py::object& budget_s, const py::object& chunk_tokens) {
  PlanOptions o;
  o.granularity = granularity_from(value_from<std::string>("granularity", granularity));
  o.budget_s = positive("budget_s", budget_s);
  o.chunk_tokens = value_from<int32_t>("chunk_tokens", chunk_tokens);
  if (o.chunk_tokens < 1) {
    throw std::invalid_argument("chunk_tokens: got " + std::to_string(o.chunk_tokens) +
                                ", expected at least 1");
  }
  o.rates = rates;
  return o;
}

Sequence make_sequence(const py::object& rows, const py::object& context,
                       const py::object& block_table, const py::object& next_token) {
  Sequence s;
  s.rows = value_from<int32_t>("rows", rows);
  s.context = value_from<int32_t>("context", context);
  s.block_table = ids_from("block_table", block_table);
  s.next_token = value_from<int32_t>("next_token", next_token);
  return s;
}

SamplingParams make_sampling(const py::object& temperature, const py::object& top_k,
                             const py::object& top_p, const py::object& min_p,
                             const py::object& uniform) {
  return {.temperature = value_from<float>("temperature", temperature),
          .top_k = value_from<int32_t>("top_k", top_k),
          .top_p = value_from<float>("top_p", top_p),
          .min_p = value_from<float>("min_p", min_p),
          .uniform = value_from<float>("uniform", uniform)};
}

// Packs the sequences' rows one after another; the model checks the rest.
Batch make_batch(const py::object& tokens, std::vector<Sequence> sequences) {
  Batch batch;
  batch.tokens = ids_from("tokens", tokens);
  int32_t row = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& s = sequences[i];
    if (s.rows < 1 || s.rows > batch.rows() - row) {
      throw std::invalid_argument("sequence " + std::to_string(i) + ": got " +
                                  std::to_string(s.rows) + " rows, expected 1.." +
                                  std::to_string(batch.rows() - row) +
                                  ", those left of the tokens");
    }
    s.row_begin = row;
    row += s.rows;
  }
  batch.sequences = std::move(sequences);
  return batch;
}

}  // namespace

void bind_run_arguments(py::module_& m) {
  py::class_<MachineRates>(m, "MachineRates", py::module_local())
      .def(py::init(&make_rates), py::kw_only(), py::arg("gemm_flops_per_s"),
           py::arg("attention_flops_per_s"), py::arg("weight_bytes_per_s"),
           py::arg("step_overhead_s") = MachineRates().step_overhead_s,
           py::arg("cache_bytes_per_s") = py::none())
      .def_readonly("gemm_flops_per_s", &MachineRates::gemm_flops_per_s)
      .def_readonly("attention_flops_per_s", &MachineRates::attention_flops_per_s)
      .def_readonly("weight_bytes_per_s", &MachineRates::weight_bytes_per_s)
      .def_readonly("step_overhead_s", &MachineRates::step_overhead_s)
      .def_readonly("cache_bytes_per_s", &MachineRates::cache_bytes_per_s);
  py::class_<PlanOptions>(m, "PlanOptions", py::module_local())
      .def(py::init(&make_options), py::kw_only(), py::arg("granularity"), py::arg("rates"),
           py::arg("budget_s") = PlanOptions().budget_s,
           py::arg("chunk_tokens") = PlanOptions().chunk_tokens)
      .def_readonly("rates", &PlanOptions::rates)
      .def_readonly("budget_s", &PlanOptions::budget_s)
      .def_readonly("chunk_tokens", &PlanOptions::chunk_tokens);
  py::class_<Sequence>(m, "BatchSequence", py::module_local())
      .def(py::init(&make_sequence), py::kw_only(), py::arg("rows"), py::arg("context"),
           py::arg("block_table"), py::arg("next_token") = -1);
  py::class_<Batch>(m, "Batch", py::module_local())
      .def(py::init(&make_batch), py::arg("tokens"), py::arg("sequences"));
  py::class_<SamplingParams>(m, "DeviceSampling", py::module_local())
      .def(py::init(&make_sampling), py::kw_only(), py::arg("temperature"), py::arg("top_k"),
           py::arg("top_p"), py::arg("min_p"), py::arg("uniform"));
}

}  // namespace flowprefill
