#include "bindings/arguments.h"

#include <utility>

namespace py = pybind11;

namespace flowprefill {
namespace {

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

}  // namespace

TensorView tensor_from(const std::string& name, const py::handle& value) {
  auto array = array_of<float>("tensor " + name, value);
  if (array.ndim() != 1 && array.ndim() != 2) {
    throw std::invalid_argument("tensor " + name + ": got " + std::to_string(array.ndim()) +
                                " dimensions, expected 1 or 2");
  }
  const int64_t columns = array.ndim() == 2 ? array.shape(1) : 1;
  const int64_t rows = array.shape(0);
  const float* values = array.data();
  return {std::move(array), values, rows, columns};
}

std::vector<int32_t> ids_from(const std::string& name, const py::handle& value) {
  const auto array = array_of<int32_t>(name, value);
  if (array.ndim() != 1) {
    throw std::invalid_argument(name + ": got " + std::to_string(array.ndim()) +
                                " dimensions, expected 1");
  }
  return {array.data(), array.data() + array.size()};
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

void check_cache_size(int32_t block_tokens, int32_t blocks) {
  if (block_tokens < 2 || block_tokens % 2 != 0) {
    throw std::invalid_argument("block_tokens: got " + std::to_string(block_tokens) +
                                ", expected an even number");
  }
  if (blocks < 1)
    throw std::invalid_argument("blocks: got " + std::to_string(blocks) + ", expected at least 1");
}

void check_blocks(const std::vector<int32_t>& blocks, int32_t num_blocks) {
  for (const int32_t block : blocks) {
    if (block < 0 || block >= num_blocks) {
      throw std::invalid_argument("blocks: got " + std::to_string(block) + ", expected 0.." +
                                  std::to_string(num_blocks - 1));
    }
  }
}

}  // namespace flowprefill
