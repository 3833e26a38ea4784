// Binds CudaBackend: weights, KV cache and the making of runs on a GPU, and the executor that runs
// them.
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/graph_arguments.h"
#include "bindings/model.h"
#include "bindings/module.h"
#include "bindings/run_outputs.h"
#include "devices/cuda/backend/cuda_backend.h"
#include "devices/cuda/backend/cuda_model_program.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

template <typename V>
auto into(V& field) {
  return [&field](const py::dict& values, const char* key) { field = get<V>(values, key); };
}

// Every option may be left out; an unknown one is an error.
CudaBackendOptions backend_options_from(const py::dict& values) {
  CudaBackendOptions o;
  const std::map<std::string, std::function<void(const py::dict&, const char*)>> fields = {
      {"device", into(o.device)},
      {"run_ahead", into(o.run_ahead)},
      {"launches_late", into(o.launches_late)},
      {"num_lanes", into(o.num_lanes)},
      {"max_tokens", into(o.max_tokens)},
      {"max_sequences", into(o.max_sequences)},
      {"max_context", into(o.max_context)},
      {"buckets", into(o.buckets)},
      {"has_graphs", into(o.has_graphs)},
      {"graph_bytes", into(o.graph_bytes)},
      {"device_spill_bytes", into(o.device_spill_bytes)},
      {"warm_tokens", into(o.warm_tokens)},
      {"measures_gemms", into(o.measures_gemms)},
      {"measures_cublas_lt", into(o.measures_cublas_lt)},
      {"gemm_cache_path", into(o.gemm_cache_path)},
      {"cublas_lt_libraries", into(o.cublas_lt_libraries)},
      {"attention", into(o.attention)},
      {"quantizes_fp8", into(o.quantizes_fp8)},
      {"fp8_sources", into(o.fp8_sources)},
  };
  for (const auto& [key, value] : values) {
    const auto name = py::cast<std::string>(key);
    const auto field = fields.find(name);
    if (field == fields.end())
      throw std::invalid_argument(name + ": no such option of a CUDA model");
    field->second(values, name.c_str());
  }
  return o;
}

std::unique_ptr<CudaBackend> make_model(const py::object& graph, const py::dict& options) {
  ModelGraph g = graph_from(graph);
  CudaBackendOptions o = backend_options_from(options);
  const py::gil_scoped_release release;
  return std::make_unique<CudaBackend>(std::move(g), std::move(o));
}

std::unique_ptr<CudaBackend> sharing_weights(const CudaBackend& model, const py::dict& options) {
  CudaBackendOptions o = backend_options_from(options);
  const py::gil_scoped_release release;
  return std::make_unique<CudaBackend>(model, std::move(o));
}

// plan: the options of the runs whose graphs are captured at the start; none: as runs come.
std::unique_ptr<Executor> make_executor(CudaBackend& model,
                                        const std::optional<PlanOptions>& plan) {
  return std::make_unique<Executor>(model.make_device(plan));
}

int32_t bucket(const py::object& object) {
  const auto* program = dynamic_cast<const CudaModelProgram*>(&program_of(own_run(object)));
  if (program == nullptr)
    throw std::invalid_argument("run: has no bucket");
  return program->bucket();
}

py::dict graph_report(const CudaBackend& model) {
  const GraphReport r = model.graph_report();
  py::dict d;
  d["num_executables"] = r.num_executables;
  d["bytes"] = r.bytes;
  d["capture_s"] = r.capture_s;
  d["num_captured"] = r.num_captured;
  d["num_replayed"] = r.num_replayed;
  d["num_evicted"] = r.num_evicted;
  d["num_no_room"] = r.num_no_room;
  d["num_failed"] = r.num_failed;
  d["last_failure"] = r.last_failure;
  return d;
}

py::dict lane_report(const CudaBackend& model) {
  const LaneReport r = model.lane_report();
  py::dict d;
  d["num_spills"] = r.num_spills;
  d["num_restores"] = r.num_restores;
  d["spilled_bytes"] = r.spilled_bytes;
  d["restored_bytes"] = r.restored_bytes;
  d["device_spill_bytes"] = r.device_spill_bytes;
  d["pinned_spill_bytes"] = r.pinned_spill_bytes;
  return d;
}

// Output and epilogue of a product: "float", "bf16 gated", "float adding with bias", ...
std::string kind_of(const GemmShape& shape) {
  return std::string(shape.output == GemmOutput::kFloat ? "float" : "bf16") +
         (shape.is_gated ? " gated" : "") + (shape.adds_to_d ? " adding" : "") +
         (shape.has_bias ? " with bias" : "") + (shape.is_fp8 ? ", fp8" : "");
}

// One entry per shape of product: (rows, columns, depth, kind, chosen kernel, {kernel: time}).
py::list gemm_report(const CudaBackend& model) {
  py::list out;
  for (const GemmReport& r : model.gemm_report()) {
    py::dict timings;
    for (const GemmTiming& t : r.timings)
      timings[py::str(t.candidate)] =
          t.failure.empty() ? py::object(py::float_(t.us)) : py::object(py::str(t.failure));
    out.append(py::make_tuple(r.rows, r.shape.columns, r.shape.depth, kind_of(r.shape), r.chosen,
                              timings));
  }
  return out;
}

}  // namespace

void bind_cuda_model(py::module_& m, py::class_<Executor> executor) {
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<CudaBackend> model(m, "Model", py::module_local());
  model.def(py::init(&make_model), py::arg("graph"), py::arg("options") = py::dict())
      .def("sharing_weights", &sharing_weights, py::arg("options") = py::dict())
      .def("finish", &CudaBackend::finish, Released())
      .def("allocate_cache", &CudaBackend::allocate_cache, py::arg("block_tokens"),
           py::arg("blocks"), Released())
      .def("lane_bytes", &CudaBackend::lane_bytes, py::arg("block_tokens"))
      .def("zero_blocks", &zero_blocks<CudaBackend>, py::arg("blocks"), Released())
      .def("graph_report", &graph_report)
      .def("lane_report", &lane_report)
      .def("gemm_report", &gemm_report)
      .def_property_readonly("library_failure", &CudaBackend::library_failure)
      .def_property_readonly("gemm_cache_failure", &CudaBackend::gemm_cache_failure);
  bind_model(model);
  executor.def(py::init(&make_executor), py::arg("model"), py::arg("plan") = py::none(),
               py::keep_alive<1, 2>());
  bind_run_outputs(m);
  m.def("bucket", &bucket, py::arg("run"));
}

}  // namespace flowprefill
