// Binds the CPU's models, their KV cache and the making of runs, for both element types behind one
// Python class.
#include <map>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/graph_arguments.h"
#include "bindings/module.h"
#include "bindings/pausing_program.h"
#include "bindings/run_outputs.h"
#include "devices/cpu/block_matrix.h"
#include "devices/cpu/ceilings.h"
#include "devices/cpu/cpu_backend.h"
#include "devices/cpu/cpu_program.h"
#include "devices/cpu/gemm.h"
#include "devices/cpu/isa.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

CpuElement element_of(const std::string& dtype) {
  if (dtype == "f32")
    return CpuElement::kFloat;
  if (dtype == "bf16")
    return CpuElement::kBf16;
  throw std::invalid_argument("dtype: got " + dtype + ", expected bf16 or f32");
}

CpuQuantization quantization_of(const std::string& quantization) {
  if (quantization == "none")
    return CpuQuantization::kNone;
  if (quantization == "int8")
    return CpuQuantization::kInt8;
  throw std::invalid_argument("quantization: got " + quantization + ", expected none or int8");
}

CpuNumbers numbers_of(const std::string& dtype, const std::string& quantization) {
  return {.element = element_of(dtype), .quantization = quantization_of(quantization)};
}

BlockFormats formats_from(const std::map<std::string, std::string>& names) {
  BlockFormats formats;
  for (const auto& [source, name] : names)
    formats[source] = block_format_of(name);
  return formats;
}

class Model {
 public:
  // formats: GGUF's type of each tensor that comes by load_blocks().
  Model(const py::object& graph, const std::string& dtype, int threads,
        const std::string& quantization, const std::map<std::string, std::string>& formats)
      : backend_(make_cpu_backend(graph_from(graph), numbers_of(dtype, quantization), threads,
                                  formats_from(formats))) {}

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

  void zero_blocks(const std::vector<int32_t>& blocks) {
    if (backend_->kv() != nullptr)
      backend_->kv()->zero(blocks);
  }

  // sampling: one for each sequence, or none: no tokens are chosen.
  RunRef make(uint64_t id, Batch batch, const PlanOptions& options, int64_t fail_at,
              const std::unordered_set<size_t>& pause_at,
              const std::vector<SamplingParams>& sampling, bool fetch_logits,
              const std::string& output) {
    const RunOutput wanted = output_of(output);
    py::gil_scoped_release release;
    auto program = backend_->make_program(
        std::move(batch), options,
        {.sampling = sampling, .fetch_logits = fetch_logits, .output = wanted, .fail_at = fail_at});
    return make_pausing_run(id, std::move(program), pause_at);
  }

  Backend& get() { return *backend_; }

 private:
  std::unique_ptr<Backend> backend_;
};

py::dict ceilings(int threads) {
  Ceilings found;
  {
    const py::gil_scoped_release released;
    found = measure_ceilings(threads);
  }
  py::list reads;
  for (const Ceilings::Read& read : found.reads)
    reads.append(py::make_tuple(read.bytes, read.bytes_per_s));
  return py::dict(py::arg("f32") = found.f32, py::arg("bf16") = found.bf16,
                  py::arg("int8") = found.int8, py::arg("reads") = reads);
}

}  // namespace

void bind_cpu_model(py::module_& m) {
  py::class_<Model>(m, "Model", py::module_local())
      .def(py::init<const py::object&, const std::string&, int, const std::string&,
                    const std::map<std::string, std::string>&>(),
           py::arg("graph"), py::arg("dtype"), py::arg("threads"), py::arg("quantization") = "none",
           py::arg("formats") = std::map<std::string, std::string>())
      .def("load", &Model::load, py::arg("name"), py::arg("values"))
      .def("load_blocks", &Model::load_blocks, py::arg("name"), py::arg("rows"))
      .def("finish", [](Model& model) { model.get().finish(); })
      .def(
          "allocate_cache",
          [](Model& model, int32_t block_tokens, int32_t blocks) {
            model.get().allocate_cache(block_tokens, blocks);
          },
          py::arg("block_tokens"), py::arg("blocks"))
      .def(
          "bytes_per_block",
          [](Model& model, int32_t block_tokens) {
            return model.get().bytes_per_block(block_tokens);
          },
          py::arg("block_tokens"))
      .def("zero_blocks", &Model::zero_blocks, py::arg("blocks"))
      .def("make_run", &Model::make, py::arg("id"), py::arg("batch"), py::arg("plan"),
           py::kw_only(), py::arg("fail_at") = -1,
           py::arg("pause_at") = std::unordered_set<size_t>(),
           py::arg("sampling") = std::vector<SamplingParams>(), py::arg("fetch_logits") = true,
           py::arg("output") = "logits")
      .def_property_readonly("weight_bytes",
                             [](Model& model) { return model.get().weight_bytes(); });
  m.def(
      "cpu_cuts",
      [](const std::string& dtype, int threads, const std::string& quantization) {
        return cpu_cuts(threads, numbers_of(dtype, quantization));
      },
      py::arg("dtype"), py::arg("threads"), py::arg("quantization") = "none");
  bind_run_outputs(m);
  m.def("live_workspace_bytes", &live_workspace_bytes);
  m.attr("block_formats") = [] {
    py::list names;
    for (const BlockLayout& layout : kBlockLayouts)
      names.append(layout.name);
    return py::tuple(names);
  }();
  m.def("has_bf16_gemm", &has_bf16_gemm);
  m.def("has_int8_gemm", &has_int8_gemm);
  m.def("isa", [] { return std::string(name_of(isa())); });
  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (const Isa one : available_isas())
      names.emplace_back(name_of(one));
    return names;
  });
  m.def("measure_ceilings", &ceilings, py::arg("threads"));
}

}  // namespace flowprefill
