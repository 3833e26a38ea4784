// Binds the CPU's models, their KV cache and the making of runs, for both element types behind one
// Python class.
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/graph_arguments.h"
#include "bindings/model.h"
#include "bindings/module.h"
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
  py::class_<Backend> model(m, "Model", py::module_local());
  // formats: GGUF's type of each tensor that comes by load_blocks().
  model
      .def(py::init([](const py::object& graph, const std::string& dtype, int threads,
                       const std::string& quantization,
                       const std::map<std::string, std::string>& formats) {
             return make_cpu_backend(graph_from(graph), numbers_of(dtype, quantization), threads,
                                     formats_from(formats));
           }),
           py::arg("graph"), py::arg("dtype"), py::arg("threads"), py::arg("quantization") = "none",
           py::arg("formats") = std::map<std::string, std::string>())
      .def("finish", &Backend::finish)
      .def("allocate_cache", &Backend::allocate_cache, py::arg("block_tokens"), py::arg("blocks"))
      .def("zero_blocks", &zero_blocks<Backend>, py::arg("blocks"));
  bind_model(model);
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
