#include "bindings/run_outputs.h"

#include <stdexcept>

#include "bindings/module.h"
#include "graph/backend.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

// A view of the run's logits that keeps the run alive.
py::array_t<float> logits(const py::object& object) {
  const auto& program = finished<ModelProgram>(object, "logits");
  if (program.logits() == nullptr)
    throw std::invalid_argument(
        "run: has no logits, it was made with fetch_logits=False or for embeddings");
  const py::ssize_t rows = program.num_sequences();
  const py::ssize_t columns = program.vocab_size();
  constexpr py::ssize_t kFloat = sizeof(float);
  return py::array_t<float>({rows, columns}, {kFloat * program.logits_stride(), kFloat},
                            program.logits(), object);
}

py::array_t<int32_t> sampled(const py::object& object) {
  const auto tokens = finished<ModelProgram>(object, "sampled tokens").sampled();
  return py::array_t<int32_t>(static_cast<py::ssize_t>(tokens.size()), tokens.data(), object);
}

py::array_t<int32_t> scores(const py::object& object) {
  const auto scores = finished<ModelProgram>(object, "scores").scores();
  if (scores.empty())
    throw std::invalid_argument("run: has no scores, it was made without output=\"scores\"");
  const auto rows = static_cast<py::ssize_t>(scores.size());
  const py::ssize_t columns = PromptScore::kColumns;
  return py::array_t<int32_t>({rows, columns}, reinterpret_cast<const int32_t*>(scores.data()),
                              object);
}

py::array_t<float> embeddings(const py::object& object) {
  const auto& program = finished<ModelProgram>(object, "embeddings");
  const auto values = program.embeddings();
  if (values.empty())
    throw std::invalid_argument(
        "run: has no embeddings, it was made without output=\"last\" or "
        "\"mean\"");
  const py::ssize_t rows = program.num_sequences();
  const auto columns = static_cast<py::ssize_t>(values.size()) / rows;
  return py::array_t<float>({rows, columns}, values.data(), object);
}

}  // namespace

RunOutput output_of(const std::string& name) {
  if (name == "logits")
    return RunOutput::kLogits;
  if (name == "scores")
    return RunOutput::kScores;
  if (name == "last")
    return RunOutput::kLast;
  if (name == "mean")
    return RunOutput::kMean;
  throw std::invalid_argument("output: got " + name + ", expected logits, scores, last or mean");
}

void bind_run_outputs(py::module_& m) {
  m.def(
      "has_logits",
      [](const py::object& run) {
        return finished<ModelProgram>(run, "logits").logits() != nullptr;
      },
      py::arg("run"));
  m.def("logits", &logits, py::arg("run"));
  m.def("sampled", &sampled, py::arg("run"));
  m.def("scores", &scores, py::arg("run"));
  m.def("embeddings", &embeddings, py::arg("run"));
}

}  // namespace flowprefill
