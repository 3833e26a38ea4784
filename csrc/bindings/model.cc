// Binds models, the KV cache and the making of runs, for both element types behind one Python class.
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "bindings/module.h"
#include "model/transformer_program.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

using Int32Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

template <typename V>
V get(const py::dict& values, const char* key) {
  if (!values.contains(key)) throw py::key_error(key);
  return values[key].cast<V>();
}

ModelConfig config_from(const py::dict& d) {
  ModelConfig c;
  c.vocab_size = get<int32_t>(d, "vocab_size");
  c.hidden_size = get<int32_t>(d, "hidden_size");
  c.intermediate_size = get<int32_t>(d, "intermediate_size");
  c.num_layers = get<int32_t>(d, "num_layers");
  c.num_heads = get<int32_t>(d, "num_heads");
  c.num_kv_heads = get<int32_t>(d, "num_kv_heads");
  c.head_dim = get<int32_t>(d, "head_dim");
  c.rms_eps = get<float>(d, "rms_eps");
  c.tie_embeddings = get<bool>(d, "tie_embeddings");
  c.qkv_bias = get<bool>(d, "qkv_bias");
  c.o_bias = get<bool>(d, "o_bias");
  c.mlp_bias = get<bool>(d, "mlp_bias");
  c.qk_norm = get<bool>(d, "qk_norm");
  c.windows = get<std::vector<int32_t>>(d, "windows");
  c.inverse_frequencies = get<std::vector<double>>(d, "inverse_frequencies");
  c.rope_attention_scale = get<double>(d, "rope_attention_scale");
  return c;
}

PlanOptions options_from(const py::dict& d) {
  PlanOptions o;
  const auto kind = get<std::string>(d, "granularity");
  if (kind == "none") o.granularity = Granularity::kNone;
  else if (kind == "layer") o.granularity = Granularity::kLayer;
  else if (kind == "operator") o.granularity = Granularity::kOperator;
  else if (kind == "chunk") o.granularity = Granularity::kChunk;
  else if (kind == "budget") o.granularity = Granularity::kBudget;
  else throw std::invalid_argument("granularity: got " + kind + ", expected none, layer, operator, chunk or budget");
  o.budget_s = get<double>(d, "budget_s");
  o.chunk_tokens = get<int32_t>(d, "chunk_tokens");
  o.rates.gemm_flops_per_s = get<double>(d, "gemm_flops_per_s");
  o.rates.attention_flops_per_s = get<double>(d, "attention_flops_per_s");
  o.rates.weight_bytes_per_s = get<double>(d, "weight_bytes_per_s");
  o.rates.step_overhead_s = get<double>(d, "step_overhead_s");
  return o;
}

// sequences: (rows, context, block table) each.
Batch batch_from(const Int32Array& tokens, const py::list& sequences) {
  Batch batch;
  batch.tokens.assign(tokens.data(), tokens.data() + tokens.size());
  int32_t row = 0;
  for (const py::handle item : sequences) {
    const auto entry = item.cast<py::tuple>();
    const auto table = entry[2].cast<Int32Array>();
    Sequence s;
    s.row_begin = row;
    s.rows = entry[0].cast<int32_t>();
    s.context = entry[1].cast<int32_t>();
    s.block_table.assign(table.data(), table.data() + table.size());
    row += s.rows;
    batch.sequences.push_back(std::move(s));
  }
  return batch;
}

// Workspaces kept for later runs: a long prompt's and some short ones'.
constexpr size_t kKeptWorkspaceBytes = size_t{256} << 20;

// A model and its KV cache; T is decided at construction.
class Model {
 public:
  Model(const py::dict& config, const std::string& dtype, int threads) : threads_(threads) {
    if (dtype == "f32") weights_ = std::make_shared<Weights<float>>(config_from(config), threads);
    else if (dtype == "bf16") weights_ = std::make_shared<Weights<Bf16>>(config_from(config), threads);
    else throw std::invalid_argument("dtype: got " + dtype + ", expected bf16 or f32");
    if (dtype == "bf16" && !has_bf16_gemm()) {
      throw std::invalid_argument("dtype: got bf16, but this processor does not multiply bf16 natively; expected f32");
    }
  }

  void load(const std::string& name, const FloatArray& values) {
    if (values.ndim() != 1 && values.ndim() != 2) {
      throw std::invalid_argument("tensor " + name + ": got " + std::to_string(values.ndim()) +
                                  " dimensions, expected 1 or 2");
    }
    const int64_t columns = values.ndim() == 2 ? values.shape(1) : 1;
    const float* data = values.data();
    const int64_t rows = values.shape(0);
    py::gil_scoped_release release;
    std::visit([&](auto& w) { w->load(name, data, rows, columns); }, weights_);
  }

  void finish() {
    std::visit([](auto& w) { w->finish(); }, weights_);
  }

  void allocate_cache(int32_t block_tokens, int32_t blocks) {
    if (block_tokens < 2 || block_tokens % 2 != 0) {
      throw std::invalid_argument("block_tokens: got " + std::to_string(block_tokens) + ", expected an even number");
    }
    if (blocks < 1) throw std::invalid_argument("blocks: got " + std::to_string(blocks) + ", expected at least 1");
    const ModelConfig& c = config();
    cache_ = std::make_shared<KvCache>(
        KvShape{c.num_layers, c.num_kv_heads, c.head_dim, block_tokens, blocks}, element_bytes());
  }

  size_t bytes_per_block(int32_t block_tokens) const {
    const ModelConfig& c = config();
    return KvCache::bytes_per_block({c.num_layers, c.num_kv_heads, c.head_dim, block_tokens, 1}, element_bytes());
  }

  void zero_blocks(const std::vector<int32_t>& blocks) {
    if (cache_ != nullptr) cache_->zero(blocks);
  }

  RunRef make(uint64_t id, const Int32Array& tokens, const py::list& sequences, const py::dict& plan,
              int64_t fail_at) {
    if (cache_ == nullptr) throw std::logic_error("allocate_cache() comes first");
    PlanOptions options = options_from(plan);
    options.threads = threads_;
    options.element_bytes = element_bytes();
    Batch batch = batch_from(tokens, sequences);
    py::gil_scoped_release release;
    return make_run(id, std::visit(
        [&]<typename T>(const std::shared_ptr<Weights<T>>& w) -> std::unique_ptr<Program> {
          return std::make_unique<TransformerProgram<T>>(w, cache_, pool_, std::move(batch), options, fail_at);
        },
        weights_));
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
  std::variant<std::shared_ptr<Weights<float>>, std::shared_ptr<Weights<Bf16>>> weights_;
  std::shared_ptr<KvCache> cache_;
  std::shared_ptr<BufferPool> pool_ = std::make_shared<BufferPool>(kKeptWorkspaceBytes);
};

// A view of the run's logits that keeps the run alive.
py::array_t<float> logits(const py::object& run_object) {
  auto& run = run_object.cast<Run&>();
  const auto* program = dynamic_cast<const LogitsProgram*>(&run.program());
  if (program == nullptr) throw std::invalid_argument("run: has no logits");
  if (run.state() != RunState::kFinished) {
    throw std::invalid_argument(std::string("run: is ") + to_string(run.state()) + ", logits exist once it has finished");
  }
  const py::ssize_t rows = program->num_sequences();
  const auto columns = static_cast<py::ssize_t>(program->vocab_size());
  return py::array_t<float>({rows, columns}, program->logits(), run_object);
}

}  // namespace

void bind_model(py::module_& m) {
  py::class_<Model>(m, "Model")
      .def(py::init<const py::dict&, const std::string&, int>(), py::arg("config"), py::arg("dtype"),
           py::arg("threads"))
      .def("load", &Model::load, py::arg("name"), py::arg("values"))
      .def("finish", &Model::finish)
      .def("allocate_cache", &Model::allocate_cache, py::arg("block_tokens"), py::arg("blocks"))
      .def("bytes_per_block", &Model::bytes_per_block, py::arg("block_tokens"))
      .def("zero_blocks", &Model::zero_blocks, py::arg("blocks"))
      .def("make_run", &Model::make, py::arg("id"), py::arg("tokens"), py::arg("sequences"),
           py::arg("plan"), py::arg("fail_at") = -1)
      .def_property_readonly("weight_bytes", &Model::weight_bytes);
  m.def("logits", &logits, py::arg("run"));
  m.def("live_workspace_bytes", &live_workspace_bytes);
  m.def("has_bf16_gemm", &has_bf16_gemm);
  m.def("row_kernel_isa", &row_kernel_isa);
}

}  // namespace flowprefill
