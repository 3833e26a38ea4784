// Binds CudaBackend: weights, KV cache and the making of runs on a GPU, and the executor that runs
// them.
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/graph_arguments.h"
#include "bindings/module.h"
#include "bindings/pausing_program.h"
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

// What stays the same for a user of either module: see CPU's Model.
class GpuModel {
 public:
  GpuModel(const py::object& graph, const py::dict& options) {
    ModelGraph g = graph_from(graph);
    CudaBackendOptions o = backend_options_from(options);
    py::gil_scoped_release release;
    backend_ = std::make_unique<CudaBackend>(std::move(g), std::move(o));
  }

  GpuModel(const GpuModel& weights_of, const py::dict& options) {
    CudaBackendOptions o = backend_options_from(options);
    py::gil_scoped_release release;
    backend_ = std::make_unique<CudaBackend>(*weights_of.backend_, std::move(o));
  }

  void load(const std::string& name, const py::object& object) {
    const TensorView tensor = tensor_from(name, object);
    py::gil_scoped_release release;
    backend_->load(name, tensor.values, tensor.rows, tensor.columns);
  }

  void load_blocks(const std::string& name, const Array<uint8_t>& rows) {
    check_block_rows(name, rows);
    py::gil_scoped_release release;
    backend_->load_blocks(name, rows.data(), rows.shape(0), rows.shape(1));
  }

  void allocate_cache(int32_t block_tokens, int32_t blocks) {
    py::gil_scoped_release release;
    backend_->allocate_cache(block_tokens, blocks);
  }

  void zero_blocks(const std::vector<int32_t>& blocks) {
    py::gil_scoped_release release;
    if (backend_->kv() != nullptr)
      backend_->kv()->zero(blocks);
  }

  // sampling: one for each sequence; none at all: the most likely tokens.
  RunRef make(uint64_t id, const Batch& batch, const PlanOptions& options, int64_t fail_at,
              const std::unordered_set<size_t>& pause_at,
              const std::vector<SamplingParams>& sampling, bool fetch_logits,
              const std::string& output) {
    const RunOutput wanted = output_of(output);
    py::gil_scoped_release release;
    auto program = backend_->make_program(
        batch, options,
        {.sampling = sampling, .fetch_logits = fetch_logits, .output = wanted, .fail_at = fail_at});
    return make_pausing_run(id, std::move(program), pause_at);
  }

  CudaBackend& get() { return *backend_; }
  const CudaBackend& get() const { return *backend_; }

 private:
  std::unique_ptr<CudaBackend> backend_;
};

// plan: the options of the runs whose graphs are captured at the start; none: as runs come.
std::unique_ptr<Executor> make_executor(GpuModel& model, const std::optional<PlanOptions>& plan) {
  return std::make_unique<Executor>(model.get().make_device(plan));
}

int32_t bucket(const py::object& object) {
  const auto* program = dynamic_cast<const CudaModelProgram*>(&program_of(own_run(object)));
  if (program == nullptr)
    throw std::invalid_argument("run: has no bucket");
  return program->bucket();
}

py::dict graph_report(const GpuModel& model) {
  const GraphReport r = model.get().graph_report();
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

py::dict lane_report(const GpuModel& model) {
  const LaneReport r = model.get().lane_report();
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
py::list gemm_report(const GpuModel& model) {
  py::list out;
  for (const GemmReport& r : model.get().gemm_report()) {
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
  py::class_<GpuModel>(m, "Model", py::module_local())
      .def(py::init<const py::object&, const py::dict&>(), py::arg("graph"),
           py::arg("options") = py::dict())
      .def(
          "sharing_weights",
          [](const GpuModel& model, const py::dict& options) {
            return std::make_unique<GpuModel>(model, options);
          },
          py::arg("options") = py::dict())
      .def("load", &GpuModel::load, py::arg("name"), py::arg("values"))
      .def("load_blocks", &GpuModel::load_blocks, py::arg("name"), py::arg("rows"))
      .def(
          "finish", [](GpuModel& model) { model.get().finish(); },
          py::call_guard<py::gil_scoped_release>())
      .def("allocate_cache", &GpuModel::allocate_cache, py::arg("block_tokens"), py::arg("blocks"))
      .def(
          "bytes_per_block",
          [](const GpuModel& model, int32_t block_tokens) {
            return model.get().bytes_per_block(block_tokens);
          },
          py::arg("block_tokens"))
      .def(
          "lane_bytes",
          [](const GpuModel& model, int32_t block_tokens) {
            return model.get().lane_bytes(block_tokens);
          },
          py::arg("block_tokens"))
      .def("zero_blocks", &GpuModel::zero_blocks, py::arg("blocks"))
      .def("make_run", &GpuModel::make, py::arg("id"), py::arg("batch"), py::arg("plan"),
           py::kw_only(), py::arg("fail_at") = -1,
           py::arg("pause_at") = std::unordered_set<size_t>(),
           py::arg("sampling") = std::vector<SamplingParams>(), py::arg("fetch_logits") = true,
           py::arg("output") = "logits")
      .def("graph_report", &graph_report)
      .def("lane_report", &lane_report)
      .def("gemm_report", &gemm_report)
      .def_property_readonly("library_failure",
                             [](const GpuModel& model) { return model.get().library_failure(); })
      .def_property_readonly("weight_bytes",
                             [](const GpuModel& model) { return model.get().weight_bytes(); });
  executor.def(py::init(&make_executor), py::arg("model"), py::arg("plan") = py::none(),
               py::keep_alive<1, 2>());
  bind_run_outputs(m);
  m.def("bucket", &bucket, py::arg("run"));
}

}  // namespace flowprefill
