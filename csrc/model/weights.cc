#include "model/weights.h"

#include <algorithm>
#include <stdexcept>

#include "ops/team.h"

namespace flowprefill {
namespace {

void expect(const std::string& name, int64_t rows, int64_t columns, int64_t want_rows,
            int64_t want_columns) {
  if (rows == want_rows && columns == want_columns) return;
  auto shape = [](int64_t r, int64_t c) {
    return "[" + std::to_string(r) + ", " + std::to_string(c) + "]";
  };
  throw std::invalid_argument("tensor " + name + ": got shape " + shape(rows, columns) +
                              ", expected " + shape(want_rows, want_columns));
}

// Names of one layer's tensors that this config must have.
std::vector<std::string> layer_names(const ModelConfig& c) {
  std::vector<std::string> names = {"attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down"};
  auto add = [&](bool has, std::initializer_list<const char*> more) {
    if (has) names.insert(names.end(), more.begin(), more.end());
  };
  add(c.qkv_bias, {"q_bias", "k_bias", "v_bias"});
  add(c.o_bias, {"o_bias"});
  add(c.mlp_bias, {"gate_bias", "up_bias", "down_bias"});
  add(c.qk_norm, {"q_norm", "k_norm"});
  return names;
}

}  // namespace

template <typename T>
Weights<T>::Weights(ModelConfig config, int threads)
    : config_(std::move(config)), threads_(threads) {
  check(config_);
  const ModelConfig& c = config_;
  embed_ = Buffer(sizeof(T) * static_cast<size_t>(c.vocab_size) * static_cast<size_t>(c.hidden_size));
  head_ = PackedLinear<T>(c.hidden_size, c.vocab_size);
  layers_.resize(static_cast<size_t>(c.num_layers));
  for (LayerWeights<T>& layer : layers_) {
    layer.qkv = PackedLinear<T>(c.hidden_size, c.qkv_columns());
    layer.o = PackedLinear<T>(c.q_columns(), c.hidden_size);
    layer.gate_up = PackedLinear<T>(c.hidden_size, int64_t{2} * c.intermediate_size);
    layer.down = PackedLinear<T>(c.intermediate_size, c.hidden_size);
    if (c.qkv_bias) layer.qkv_bias.resize(static_cast<size_t>(c.qkv_columns()));
    if (c.mlp_bias) layer.gate_up_bias.resize(static_cast<size_t>(2 * c.intermediate_size));
  }
}

template <typename T>
int64_t Weights<T>::gate_up_column(int64_t index, bool is_up) const {
  const int64_t run = index / kGateColumns;
  const int64_t width = std::min<int64_t>(kGateColumns, config_.intermediate_size - run * kGateColumns);
  return run * kPackColumns + (is_up ? width : 0) + index % kGateColumns;
}

template <typename T>
void Weights<T>::load(const std::string& name, const float* values, int64_t rows, int64_t columns) {
  const ModelConfig& c = config_;
  if (name == "embed") {
    expect(name, rows, columns, c.vocab_size, c.hidden_size);
    load_embedding(values);
  } else if (name == "lm_head") {
    expect(name, rows, columns, c.vocab_size, c.hidden_size);
    head_.pack(values, rows, threads_, [](int64_t row) { return row; });
  } else if (name == "final_norm") {
    expect(name, rows, columns, c.hidden_size, 1);
    final_norm_.assign(values, values + rows);
  } else {
    const size_t dot = name.find('.', 7);
    const bool is_layer = name.starts_with("layers.") && dot != std::string::npos;
    const int64_t index = is_layer ? std::atoll(name.substr(7, dot - 7).c_str()) : -1;
    if (index < 0 || index >= c.num_layers) throw std::invalid_argument("tensor " + name + ": unknown name");
    load_layer(layers_[static_cast<size_t>(index)], name, values, rows, columns);
  }
  loaded_.insert(name);
}

template <typename T>
void Weights<T>::load_embedding(const float* values) {
  const int32_t width = config_.hidden_size;
  team_for(threads_, config_.vocab_size, [&](int64_t row) {
    row_kernels<T>().narrow(values + row * width, width, embed_.as<T>() + row * width);
  });
  if (config_.tie_embeddings) {
    head_.pack(values, config_.vocab_size, threads_, [](int64_t row) { return row; });
  }
}

template <typename T>
void Weights<T>::load_layer(LayerWeights<T>& layer, const std::string& name, const float* values,
                            int64_t rows, int64_t columns) {
  const ModelConfig& c = config_;
  const std::string part = name.substr(name.find('.', 7) + 1);
  const int64_t q = c.q_columns();
  const int64_t kv = c.kv_columns();
  auto matrix = [&](PackedLinear<T>& linear, int64_t want_rows, auto place) {
    expect(name, rows, columns, want_rows, linear.depth());
    linear.pack(values, rows, threads_, place);
  };
  auto vector = [&](std::vector<float>& target, int64_t size) {
    expect(name, rows, columns, size, 1);
    target.assign(values, values + rows);
  };
  auto part_of = [&](std::vector<float>& target, int64_t size, auto place) {
    expect(name, rows, columns, size, 1);
    if (target.empty()) throw std::invalid_argument("tensor " + name + ": the config says there is none");
    for (int64_t i = 0; i < rows; ++i) target[static_cast<size_t>(place(i))] = values[i];
  };
  auto after = [](int64_t offset) { return [offset](int64_t i) { return offset + i; }; };
  auto gate = [this](int64_t i) { return gate_up_column(i, false); };
  auto up = [this](int64_t i) { return gate_up_column(i, true); };
  if (part == "q") matrix(layer.qkv, q, after(0));
  else if (part == "k") matrix(layer.qkv, kv, after(q));
  else if (part == "v") matrix(layer.qkv, kv, after(q + kv));
  else if (part == "o") matrix(layer.o, c.hidden_size, after(0));
  else if (part == "gate") matrix(layer.gate_up, c.intermediate_size, gate);
  else if (part == "up") matrix(layer.gate_up, c.intermediate_size, up);
  else if (part == "down") matrix(layer.down, c.hidden_size, after(0));
  else if (part == "q_bias") part_of(layer.qkv_bias, q, after(0));
  else if (part == "k_bias") part_of(layer.qkv_bias, kv, after(q));
  else if (part == "v_bias") part_of(layer.qkv_bias, kv, after(q + kv));
  else if (part == "gate_bias") part_of(layer.gate_up_bias, c.intermediate_size, gate);
  else if (part == "up_bias") part_of(layer.gate_up_bias, c.intermediate_size, up);
  else if (part == "o_bias") vector(layer.o_bias, c.hidden_size);
  else if (part == "down_bias") vector(layer.down_bias, c.hidden_size);
  else if (part == "attn_norm") vector(layer.attn_norm, c.hidden_size);
  else if (part == "mlp_norm") vector(layer.mlp_norm, c.hidden_size);
  else if (part == "q_norm") vector(layer.q_norm, c.head_dim);
  else if (part == "k_norm") vector(layer.k_norm, c.head_dim);
  else throw std::invalid_argument("tensor " + name + ": unknown name");
}

template <typename T>
void Weights<T>::finish() {
  auto require = [this](const std::string& name) {
    if (!loaded_.contains(name)) throw std::invalid_argument("tensor " + name + ": missing");
  };
  require("embed");
  require("final_norm");
  if (!config_.tie_embeddings) require("lm_head");
  for (int32_t i = 0; i < config_.num_layers; ++i) {
    for (const std::string& part : layer_names(config_)) {
      require("layers." + std::to_string(i) + "." + part);
    }
  }
}

template <typename T>
size_t Weights<T>::bytes() const {
  size_t total = embed_.bytes() + head_.bytes();
  for (const LayerWeights<T>& layer : layers_) {
    total += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  }
  return total;
}

template class Weights<float>;
template class Weights<Bf16>;

}  // namespace flowprefill
