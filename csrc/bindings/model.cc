// Binds models, the KV cache and the making of runs, for both element types behind one Python
// class.
#include <cmath>
#include <memory>
#include <string>
#include <unordered_set>
#include <variant>
#include <vector>

#include "bindings/module.h"
#include "bindings/pausing_program.h"
#include "model/transformer_program.h"

namespace py = pybind11;

namespace flowprefill {
namespace {

template <typename E>
using Array = py::array_t<E, py::array::c_style | py::array::forcecast>;

// Takes arrays of exactly this element type: a silent conversion would cut ids or compute on
// rounded weights.
template <typename E>
Array<E> array_of(const std::string& name, const py::handle& value) {
  const char* wanted = std::is_same_v<E, float> ? "float32" : "int32";
  if (!py::isinstance<py::array>(value)) {
    throw std::invalid_argument(name + ": got " +
                                std::string(py::str(py::type::of(value).attr("__name__"))) +
                                ", expected an array of " + wanted);
  }
  const auto array = py::reinterpret_borrow<py::array>(value);
  if (!array.dtype().is(py::dtype::of<E>()) && !array.dtype().equal(py::dtype::of<E>())) {
    throw std::invalid_argument(name + ": got an array of " + std::string(py::str(array.dtype())) +
                                ", expected " + wanted);
  }
  return Array<E>(array);
}

std::vector<int32_t> ids_of(const std::string& name, const py::handle& value) {
  const auto array = array_of<int32_t>(name, value);
  if (array.ndim() != 1) {
    throw std::invalid_argument(name + ": got " + std::to_string(array.ndim()) +
                                " dimensions, expected 1");
  }
  return {array.data(), array.data() + array.size()};
}

template <typename V>
V get(const py::dict& values, const char* key) {
  if (!values.contains(key))
    throw std::invalid_argument(std::string(key) + ": missing");
  const py::object value = values[key];
  try {
    return value.cast<V>();
  } catch (const py::cast_error&) {
    throw std::invalid_argument(std::string(key) + ": got " + std::string(py::repr(value)) +
                                ", which has the wrong type or range");
  }
}

double get_positive(const py::dict& values, const char* key) {
  const auto number = get<double>(values, key);
  if (!(std::isfinite(number) && number > 0)) {
    throw std::invalid_argument(std::string(key) + ": got " + std::to_string(number) +
                                ", expected a number > 0");
  }
  return number;
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
  if (kind == "none")
    o.granularity = Granularity::kNone;
  else if (kind == "layer")
    o.granularity = Granularity::kLayer;
  else if (kind == "operator")
    o.granularity = Granularity::kOperator;
  else if (kind == "chunk")
    o.granularity = Granularity::kChunk;
  else if (kind == "budget")
    o.granularity = Granularity::kBudget;
  else
    throw std::invalid_argument("granularity: got " + kind +
                                ", expected none, layer, operator, chunk or budget");
  o.budget_s = get_positive(d, "budget_s");
  o.chunk_tokens = get<int32_t>(d, "chunk_tokens");
  if (o.chunk_tokens < 1) {
    throw std::invalid_argument("chunk_tokens: got " + std::to_string(o.chunk_tokens) +
                                ", expected at least 1");
  }
  o.rates.gemm_flops_per_s = get_positive(d, "gemm_flops_per_s");
  o.rates.attention_flops_per_s = get_positive(d, "attention_flops_per_s");
  o.rates.weight_bytes_per_s = get_positive(d, "weight_bytes_per_s");
  o.rates.step_overhead_s = get<double>(d, "step_overhead_s");
  return o;
}

// sequences: (rows, context, block table) each.
Batch batch_from(const py::object& tokens, const py::list& sequences) {
  Batch batch;
  batch.tokens = ids_of("tokens", tokens);
  int32_t row = 0;
  for (const py::handle item : sequences) {
    const std::string name = "sequence " + std::to_string(batch.sequences.size());
    if (!py::isinstance<py::tuple>(item) || py::len(item) != 3) {
      throw std::invalid_argument(name + ": expected a tuple of rows, context and block table");
    }
    const auto entry = py::reinterpret_borrow<py::tuple>(item);
    Sequence s;
    s.row_begin = row;
    try {
      s.rows = entry[0].cast<int32_t>();
      s.context = entry[1].cast<int32_t>();
    } catch (const py::cast_error&) {
      throw std::invalid_argument(name + ": rows and context: expected integers");
    }
    if (s.rows < 1 || s.rows > batch.rows() - row) {
      throw std::invalid_argument(name + ": got " + std::to_string(s.rows) + " rows, expected 1.." +
                                  std::to_string(batch.rows() - row) +
                                  ", those left of the tokens");
    }
    s.block_table = ids_of(name + ": block table", entry[2]);
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
    const auto values = array_of<float>("tensor " + name, object);
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
    is_finished_ = true;
  }

  void allocate_cache(int32_t block_tokens, int32_t blocks) {
    if (block_tokens < 2 || block_tokens % 2 != 0) {
      throw std::invalid_argument("block_tokens: got " + std::to_string(block_tokens) +
                                  ", expected an even number");
    }
    if (blocks < 1)
      throw std::invalid_argument("blocks: got " + std::to_string(blocks) +
                                  ", expected at least 1");
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
    for (const int32_t block : blocks) {
      if (block < 0 || block >= cache_->shape().blocks) {
        throw std::invalid_argument("blocks: got " + std::to_string(block) + ", expected 0.." +
                                    std::to_string(cache_->shape().blocks - 1));
      }
    }
    cache_->zero(blocks);
  }

  RunRef make(uint64_t id, const py::object& tokens, const py::list& sequences,
              const py::dict& plan, int64_t fail_at, const std::unordered_set<size_t>& pause_at) {
    if (!is_finished_ || cache_ == nullptr)
      throw std::logic_error("finish() and allocate_cache() come first");
    PlanOptions options = options_from(plan);
    options.threads = threads_;
    options.element_bytes = element_bytes();
    Batch batch = batch_from(tokens, sequences);
    py::gil_scoped_release release;
    std::unique_ptr<LogitsProgram> program = std::visit(
        [&]<typename T>(const std::shared_ptr<Weights<T>>& w) -> std::unique_ptr<LogitsProgram> {
          return std::make_unique<TransformerProgram<T>>(w, cache_, pool_, std::move(batch),
                                                         options, fail_at);
        },
        weights_);
    if (pause_at.empty())
      return make_run(id, std::move(program));
    auto pausing = std::make_unique<PausingProgram>(std::move(program), pause_at);
    PausingProgram& attached = *pausing;
    RunRef run = make_run(id, std::move(pausing));
    attached.attach(*run);
    return run;
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
py::array_t<float> logits(const py::object& run_object) {
  auto& run = run_object.cast<Run&>();
  const auto* program = dynamic_cast<const LogitsProgram*>(&run.program());
  if (program == nullptr)
    throw std::invalid_argument("run: has no logits");
  if (run.state() != RunState::kFinished) {
    throw std::invalid_argument(std::string("run: is ") + to_string(run.state()) +
                                ", logits exist once it has finished");
  }
  const py::ssize_t rows = program->num_sequences();
  const auto columns = static_cast<py::ssize_t>(program->vocab_size());
  return py::array_t<float>({rows, columns}, program->logits(), run_object);
}

}  // namespace

void bind_model(py::module_& m) {
  py::class_<Model>(m, "Model")
      .def(py::init<const py::dict&, const std::string&, int>(), py::arg("config"),
           py::arg("dtype"), py::arg("threads"))
      .def("load", &Model::load, py::arg("name"), py::arg("values"))
      .def("finish", &Model::finish)
      .def("allocate_cache", &Model::allocate_cache, py::arg("block_tokens"), py::arg("blocks"))
      .def("bytes_per_block", &Model::bytes_per_block, py::arg("block_tokens"))
      .def("zero_blocks", &Model::zero_blocks, py::arg("blocks"))
      .def("make_run", &Model::make, py::arg("id"), py::arg("tokens"), py::arg("sequences"),
           py::arg("plan"), py::arg("fail_at") = -1,
           py::arg("pause_at") = std::unordered_set<size_t>())
      .def_property_readonly("weight_bytes", &Model::weight_bytes);
  m.def("logits", &logits, py::arg("run"));
  m.def("live_workspace_bytes", &live_workspace_bytes);
  m.def("has_bf16_gemm", &has_bf16_gemm);
  m.def("row_kernel_isa", &row_kernel_isa);
}

}  // namespace flowprefill
