// bind_model(): what a model is to Python in both modules. Called by cpu_model.cc and
// cuda_model.cc, which add how it is made and the calls that only one of them makes without the
// GIL.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/module.h"
#include "bindings/pausing_program.h"
#include "bindings/run_outputs.h"
#include "graph/backend.h"

namespace flowprefill {

// B: the module's Backend.
template <typename B>
void zero_blocks(B& backend, const std::vector<int32_t>& blocks) {
  if (backend.kv() != nullptr)
    backend.kv()->zero(blocks);
}

template <typename B>
void bind_model(pybind11::class_<B>& model) {
  namespace py = pybind11;
  model
      .def(
          "load",
          [](B& backend, const std::string& name, const py::object& object) {
            const TensorView tensor = tensor_from(name, object);
            const py::gil_scoped_release release;
            backend.load(name, tensor.values, tensor.rows, tensor.columns);
          },
          py::arg("name"), py::arg("values"))
      .def(
          "load_blocks",
          [](B& backend, const std::string& name, const Array<uint8_t>& rows) {
            check_block_rows(name, rows);
            const py::gil_scoped_release release;
            backend.load_blocks(name, rows.data(), rows.shape(0), rows.shape(1));
          },
          py::arg("name"), py::arg("rows"))
      .def("bytes_per_block", &B::bytes_per_block, py::arg("block_tokens"))
      .def(
          "make_run",
          [](B& backend, uint64_t id, Batch batch, const PlanOptions& plan, int64_t fail_at,
             const std::unordered_set<size_t>& pause_at,
             const std::vector<SamplingParams>& sampling, bool fetch_logits,
             const std::string& output) {
            const RunOutput wanted = output_of(output);
            const py::gil_scoped_release release;
            auto program = backend.make_program(std::move(batch), plan,
                                                {.sampling = sampling,
                                                 .fetch_logits = fetch_logits,
                                                 .output = wanted,
                                                 .fail_at = fail_at});
            return make_pausing_run(id, std::move(program), pause_at);
          },
          py::arg("id"), py::arg("batch"), py::arg("plan"), py::kw_only(), py::arg("fail_at") = -1,
          py::arg("pause_at") = std::unordered_set<size_t>(),
          py::arg("sampling") = std::vector<SamplingParams>(), py::arg("fetch_logits") = true,
          py::arg("output") = "logits")
      .def_property_readonly("weight_bytes", &B::weight_bytes);
}

}  // namespace flowprefill
