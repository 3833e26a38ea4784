#include "devices/cpu/weights.h"

#include <algorithm>
#include <stdexcept>

namespace flowprefill {
namespace {

void expect(const std::string& name, int64_t rows, int64_t columns, int64_t want_rows,
            int64_t want_columns) {
  if (rows == want_rows && columns == want_columns)
    return;
  auto shape = [](int64_t r, int64_t c) {
    return "[" + std::to_string(r) + ", " + std::to_string(c) + "]";
  };
  throw std::invalid_argument("tensor " + name + ": got shape " + shape(rows, columns) +
                              ", expected " + shape(want_rows, want_columns));
}

// Names of one layer's tensors that this config must have.
std::vector<std::string> layer_names(const ModelConfig& c) {
  std::vector<std::string> names = {"attn_norm", "q",    "k",  "v",   "o",
                                    "mlp_norm",  "gate", "up", "down"};
  auto add = [&](bool has, std::initializer_list<const char*> more) {
    if (has)
      names.insert(names.end(), more.begin(), more.end());
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
    : config_(std::move(config)), team_(std::make_unique<Team>(threads)) {
  check(config_);
  const ModelConfig& c = config_;
  embed_ =
      Buffer(sizeof(T) * static_cast<size_t>(c.vocab_size) * static_cast<size_t>(c.hidden_size));
  head_ = PackedLinear<T>(c.hidden_size, c.vocab_size);
  layers_.resize(static_cast<size_t>(c.num_layers));
  for (LayerWeights<T>& layer : layers_) {
    layer.qkv = PackedLinear<T>(c.hidden_size, c.qkv_columns());
    layer.o = PackedLinear<T>(c.q_columns(), c.hidden_size);
    layer.gate_up = PackedLinear<T>(c.hidden_size, int64_t{2} * c.intermediate_size);
    layer.down = PackedLinear<T>(c.intermediate_size, c.hidden_size);
    const auto size = [](bool has, int64_t count) { return static_cast<size_t>(has ? count : 0); };
    layer.attn_norm.resize(size(true, c.hidden_size));
    layer.mlp_norm.resize(size(true, c.hidden_size));
    layer.q_norm.resize(size(c.qk_norm, c.head_dim));
    layer.k_norm.resize(size(c.qk_norm, c.head_dim));
    layer.qkv_bias.resize(size(c.qkv_bias, c.qkv_columns()));
    layer.o_bias.resize(size(c.o_bias, c.hidden_size));
    layer.gate_up_bias.resize(size(c.mlp_bias, int64_t{2} * c.intermediate_size));
    layer.down_bias.resize(size(c.mlp_bias, c.hidden_size));
  }
}

template <typename T>
int64_t Weights<T>::gate_up_column(int64_t index, bool is_up) const {
  const int64_t run = index / kGateColumns;
  const int64_t width =
      std::min<int64_t>(kGateColumns, config_.intermediate_size - run * kGateColumns);
  return run * kPackColumns + (is_up ? width : 0) + index % kGateColumns;
}

template <typename T>
void Weights<T>::load(const std::string& name, const float* values, int64_t rows, int64_t columns) {
  const ModelConfig& c = config_;
  if (team_ == nullptr)
    throw std::logic_error("tensor " + name + ": loaded after finish()");
  if (name == "embed") {
    expect(name, rows, columns, c.vocab_size, c.hidden_size);
    load_embedding(values);
  } else if (name == "lm_head") {
    expect(name, rows, columns, c.vocab_size, c.hidden_size);
    head_.pack(values, rows, *team_, [](int64_t row) { return row; });
  } else if (name == "final_norm") {
    expect(name, rows, columns, c.hidden_size, 1);
    final_norm_.assign(values, values + rows);
  } else {
    const size_t dot = name.find('.', 7);
    const bool is_layer = name.starts_with("layers.") && dot != std::string::npos;
    const int64_t index = is_layer ? std::atoll(name.substr(7, dot - 7).c_str()) : -1;
    if (index < 0 || index >= c.num_layers)
      throw std::invalid_argument("tensor " + name + ": unknown name");
    load_layer(layers_[static_cast<size_t>(index)], name, values, rows, columns);
  }
  loaded_.insert(name);
}

template <typename T>
void Weights<T>::load_embedding(const float* values) {
  const int32_t width = config_.hidden_size;
  team_->for_each(config_.vocab_size, [&](int64_t row) {
    row_kernels<T>().narrow(values + row * width, width, embed_.as<T>() + row * width);
  });
  if (config_.tie_embeddings) {
    head_.pack(values, config_.vocab_size, *team_, [](int64_t row) { return row; });
  }
}

// Where the tensors of one layer go: a matrix or a vector, and which of its columns each row
// becomes.
template <typename T>
std::map<std::string, typename Weights<T>::Place> Weights<T>::places(LayerWeights<T>& layer) {
  const ModelConfig& c = config_;
  const int64_t hidden = c.hidden_size;
  const int64_t inner = c.intermediate_size;
  const int64_t q = c.q_columns();
  const int64_t kv = c.kv_columns();
  const Order whole = [](int64_t row) { return row; };
  const Order after_q = [q](int64_t row) { return q + row; };
  const Order after_k = [q, kv](int64_t row) { return q + kv + row; };
  const Order gate = [this](int64_t row) { return gate_up_column(row, false); };
  const Order up = [this](int64_t row) { return gate_up_column(row, true); };
  return {
      {"q", {&layer.qkv, nullptr, q, whole}},
      {"k", {&layer.qkv, nullptr, kv, after_q}},
      {"v", {&layer.qkv, nullptr, kv, after_k}},
      {"o", {&layer.o, nullptr, hidden, whole}},
      {"gate", {&layer.gate_up, nullptr, inner, gate}},
      {"up", {&layer.gate_up, nullptr, inner, up}},
      {"down", {&layer.down, nullptr, hidden, whole}},
      {"q_bias", {nullptr, &layer.qkv_bias, q, whole}},
      {"k_bias", {nullptr, &layer.qkv_bias, kv, after_q}},
      {"v_bias", {nullptr, &layer.qkv_bias, kv, after_k}},
      {"gate_bias", {nullptr, &layer.gate_up_bias, inner, gate}},
      {"up_bias", {nullptr, &layer.gate_up_bias, inner, up}},
      {"o_bias", {nullptr, &layer.o_bias, hidden, whole}},
      {"down_bias", {nullptr, &layer.down_bias, hidden, whole}},
      {"attn_norm", {nullptr, &layer.attn_norm, hidden, whole}},
      {"mlp_norm", {nullptr, &layer.mlp_norm, hidden, whole}},
      {"q_norm", {nullptr, &layer.q_norm, c.head_dim, whole}},
      {"k_norm", {nullptr, &layer.k_norm, c.head_dim, whole}},
  };
}

template <typename T>
void Weights<T>::load_layer(LayerWeights<T>& layer, const std::string& name, const float* values,
                            int64_t rows, int64_t columns) {
  const auto all = places(layer);
  const auto found = all.find(name.substr(name.find('.', 7) + 1));
  if (found == all.end())
    throw std::invalid_argument("tensor " + name + ": unknown name");
  const Place& place = found->second;
  if (place.matrix != nullptr) {
    expect(name, rows, columns, place.rows, place.matrix->depth());
    place.matrix->pack(values, rows, *team_, place.order);
    return;
  }
  expect(name, rows, columns, place.rows, 1);
  if (place.vector->empty())
    throw std::invalid_argument("tensor " + name + ": the config says there is none");
  for (int64_t row = 0; row < rows; ++row) {
    (*place.vector)[static_cast<size_t>(place.order(row))] = values[row];
  }
}

template <typename T>
void Weights<T>::finish() {
  auto require = [this](const std::string& name) {
    if (!loaded_.contains(name))
      throw std::invalid_argument("tensor " + name + ": missing");
  };
  require("embed");
  require("final_norm");
  if (!config_.tie_embeddings)
    require("lm_head");
  for (int32_t i = 0; i < config_.num_layers; ++i) {
    for (const std::string& part : layer_names(config_)) {
      require("layers." + std::to_string(i) + "." + part);
    }
  }
  team_.reset();
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
