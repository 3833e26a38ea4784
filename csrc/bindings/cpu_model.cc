// Binds the CPU's models, their KV cache and the making of runs, for both element types behind one
// Python class.
#include <memory>
#include <string>
#include <unordered_set>
#include <variant>
#include <vector>

#include "bindings/arguments.h"
#include "bindings/module.h"
#include "bindings/pausing_program.h"
#include "devices/cpu/transformer_program.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

// Workspaces kept for later runs: a long prompt's and some short ones'.
constexpr size_t kKeptWorkspaceBytes = size_t{256} << 20;

// A model and its KV cache; T is decided at construction.
class Model {
 public:
  Model(const py::dict& config, const std::string& dtype, int threads) : threads_(threads) {
    if (threads < 1) {
      throw std::invalid_argument("threads: got " + std::to_string(threads) +
                                  ", expected at least 1");
    }
    if (dtype == "f32")
      weights_ = std::make_shared<Weights<float>>(config_from(config), threads);
    else if (dtype == "bf16")
      weights_ = std::make_shared<Weights<Bf16>>(config_from(config), threads);
    else
      throw std::invalid_argument("dtype: got " + dtype + ", expected bf16 or f32");
    if (dtype == "bf16" && !has_bf16_gemm()) {
      throw std::invalid_argument(
          "dtype: got bf16, but this processor does not multiply bf16 natively; expected f32");
    }
  }

  void load(const std::string& name, const py::object& object) {
    const TensorView tensor = tensor_from(name, object);
    py::gil_scoped_release release;
    std::visit([&](auto& w) { w->load(name, tensor.values, tensor.rows, tensor.columns); },
               weights_);
  }

  void finish() {
    std::visit([](auto& w) { w->finish(); }, weights_);
    is_finished_ = true;
  }

  void allocate_cache(int32_t block_tokens, int32_t blocks) {
    check_cache_size(block_tokens, blocks);
    const ModelConfig& c = config();
    cache_ = std::make_shared<KvCache>(
        KvShape{c.num_layers, c.num_kv_heads, c.head_dim, block_tokens, blocks}, element_bytes());
  }

  size_t bytes_per_block(int32_t block_tokens) const {
    const ModelConfig& c = config();
    return KvCache::bytes_per_block({c.num_layers, c.num_kv_heads, c.head_dim, block_tokens, 1},
                                    element_bytes());
  }

  void zero_blocks(const std::vector<int32_t>& blocks) {
    if (cache_ == nullptr)
      return;
    check_blocks(blocks, cache_->shape().blocks);
    cache_->zero(blocks);
  }

  RunRef make(uint64_t id, Batch batch, PlanOptions options, int64_t fail_at,
              const std::unordered_set<size_t>& pause_at) {
    if (!is_finished_ || cache_ == nullptr)
      throw std::logic_error("finish() and allocate_cache() come first");
    options.threads = threads_;
    options.element_bytes = element_bytes();
    py::gil_scoped_release release;
    std::unique_ptr<LogitsProgram> program = std::visit(
        [&]<typename T>(const std::shared_ptr<Weights<T>>& w) -> std::unique_ptr<LogitsProgram> {
          return std::make_unique<TransformerProgram<T>>(w, cache_, pool_, std::move(batch),
                                                         options, fail_at);
        },
        weights_);
    return make_pausing_run(id, std::move(program), pause_at);
  }

  size_t weight_bytes() const {
    return std::visit([](const auto& w) { return w->bytes(); }, weights_);
  }

 private:
  const ModelConfig& config() const {
    return std::visit([](const auto& w) -> const ModelConfig& { return w->config(); }, weights_);
  }
  int32_t element_bytes() const { return weights_.index() == 0 ? 4 : 2; }

  int threads_;
  bool is_finished_ = false;  // every weight is there
  std::variant<std::shared_ptr<Weights<float>>, std::shared_ptr<Weights<Bf16>>> weights_;
  std::shared_ptr<KvCache> cache_;
  std::shared_ptr<BufferPool> pool_ = std::make_shared<BufferPool>(kKeptWorkspaceBytes);
};

// A view of the run's logits that keeps the run alive.
py::array_t<float> logits(const py::object& object) {
  const auto& program = finished<LogitsProgram>(object, "logits");
  const py::ssize_t rows = program.num_sequences();
  const auto columns = static_cast<py::ssize_t>(program.vocab_size());
  return py::array_t<float>({rows, columns}, program.logits(), object);
}

}  // namespace

void bind_cpu_model(py::module_& m) {
  py::class_<Model>(m, "Model", py::module_local())
      .def(py::init<const py::dict&, const std::string&, int>(), py::arg("config"),
           py::arg("dtype"), py::arg("threads"))
      .def("load", &Model::load, py::arg("name"), py::arg("values"))
      .def("finish", &Model::finish)
      .def("allocate_cache", &Model::allocate_cache, py::arg("block_tokens"), py::arg("blocks"))
      .def("bytes_per_block", &Model::bytes_per_block, py::arg("block_tokens"))
      .def("zero_blocks", &Model::zero_blocks, py::arg("blocks"))
      .def("make_run", &Model::make, py::arg("id"), py::arg("batch"), py::arg("plan"),
           py::kw_only(), py::arg("fail_at") = -1,
           py::arg("pause_at") = std::unordered_set<size_t>())
      .def_property_readonly("weight_bytes", &Model::weight_bytes);
  m.def("logits", &logits, py::arg("run"));
  m.def("live_workspace_bytes", &live_workspace_bytes);
  m.def("has_bf16_gemm", &has_bf16_gemm);
  m.def("row_kernel_isa", &row_kernel_isa);
}

}  // namespace flowprefill
