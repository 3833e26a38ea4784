#include "tiny_model.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <span>

#include "reference.h"

namespace flowprefill::testing {
namespace {

// To the nearest bf16, ties to even; written apart from to_bf16().
double bf16(double value) {
  const auto x = static_cast<float>(value);
  if (x == 0)
    return 0;
  int exponent = 0;
  const double mantissa = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, 8)), exponent - 8);
}

// The nearest of e4m3's numbers: 4 bits from the first on, no smaller step than 2^-9.
double e4m3(float value) {
  int exponent = 0;
  std::frexp(value, &exponent);
  const int last = std::max(exponent - 4, -9);
  return std::clamp(std::ldexp(std::nearbyint(std::ldexp(double{value}, -last)), last), -448.0,
                    448.0);
}

// A row of numbers, divided by what makes the largest 448, rounded, multiplied again.
std::vector<double> quantised(std::span<const float> row) {
  float most = 0;
  for (const float value : row)
    most = std::max(most, std::abs(value));
  const float scale = most / 448.0f;
  std::vector<double> out;
  for (const float value : row)
    out.push_back(e4m3(value * (1.0f / scale)) * scale);
  return out;
}

std::vector<double> rounded(std::vector<double> x) {
  for (double& value : x)
    value = bf16(value);
  return x;
}

void add_to(std::vector<double>& x, const std::vector<double>& y) {
  for (size_t i = 0; i < x.size(); ++i)
    x[i] = static_cast<float>(x[i] + y[i]);
}

}  // namespace

TinyModel::TinyModel(Kind kind, int32_t num_layers, uint32_t seed) : seed_(seed) {
  shape_.num_layers = num_layers;
  if (kind == Kind::kQwen)
    shape_.qk_norm = shape_.qkv_bias = shape_.o_bias = shape_.mlp_bias = true;
  for (int32_t i = 0; kind == Kind::kWindow && i < num_layers; ++i)
    shape_.windows.push_back(i % 3 == 0 ? 16 : i % 3 == 1 ? 9 : 0);
  shape_.tie_embeddings = kind == Kind::kTied;
  const LlamaShape& c = shape_;
  add("embed", c.vocab_size, c.hidden_size, 1.0f);
  add("final_norm", c.hidden_size, 1, 0.2f, 1.0f);
  if (!c.tie_embeddings)
    add("lm_head", c.vocab_size, c.hidden_size, 0.3f);
  for (int32_t i = 0; i < num_layers; ++i) {
    const std::string layer = "layers." + std::to_string(i) + ".";
    add(layer + "attn_norm", c.hidden_size, 1, 0.2f, 1.0f);
    add(layer + "mlp_norm", c.hidden_size, 1, 0.2f, 1.0f);
    add(layer + "q", c.q_columns(), c.hidden_size, 0.12f);
    add(layer + "k", c.kv_columns(), c.hidden_size, 0.12f);
    add(layer + "v", c.kv_columns(), c.hidden_size, 0.25f);
    add(layer + "o", c.hidden_size, c.q_columns(), 0.1f);
    add(layer + "gate", c.intermediate_size, c.hidden_size, 0.2f);
    add(layer + "up", c.intermediate_size, c.hidden_size, 0.2f);
    add(layer + "down", c.hidden_size, c.intermediate_size, 0.2f);
    if (kind != Kind::kQwen)
      continue;
    add(layer + "q_norm", c.head_dim, 1, 0.2f, 1.0f);
    add(layer + "k_norm", c.head_dim, 1, 0.2f, 1.0f);
    add(layer + "q_bias", c.q_columns(), 1, 0.5f);
    add(layer + "k_bias", c.kv_columns(), 1, 0.5f);
    add(layer + "v_bias", c.kv_columns(), 1, 0.5f);
    add(layer + "o_bias", c.hidden_size, 1, 0.3f);
    add(layer + "gate_bias", c.intermediate_size, 1, 0.3f);
    add(layer + "up_bias", c.intermediate_size, 1, 0.3f);
    add(layer + "down_bias", c.hidden_size, 1, 0.3f);
  }
}

void TinyModel::add(const std::string& name, int64_t rows, int64_t columns, float scale,
                    float mean) {
  Tensor& tensor = tensors_[name];
  tensor.rows = rows;
  tensor.columns = columns;
  std::mt19937 random(seed_ * 1000 + static_cast<uint32_t>(tensors_.size()));
  std::normal_distribution<float> normal(mean, scale);
  for (int64_t i = 0; i < rows * columns; ++i)
    tensor.values.push_back(normal(random));
  if (columns > 1)
    tensor.rounded = rounded({tensor.values.begin(), tensor.values.end()});
}

void TinyModel::quantise() {
  for (auto& [name, tensor] : tensors_) {
    tensor.is_fp8 = name.starts_with("layers.") && tensor.columns > 1 && tensor.columns % 16 == 0 &&
                    tensor.rows % 16 == 0;
    const bool is_paired = name.ends_with("gate") || name.ends_with("up");  // one matrix
    tensor.is_fp8 = tensor.is_fp8 || (is_paired && tensor.columns % 16 == 0);
    for (int64_t row = 0; tensor.is_fp8 && row < tensor.rows; ++row) {
      const auto width = static_cast<size_t>(tensor.columns);
      const auto of_row =
          quantised(std::span(tensor.values).subspan(static_cast<size_t>(row) * width, width));
      std::ranges::copy(of_row, tensor.rounded.begin() + row * tensor.columns);
    }
  }
}

void TinyModel::load_into(Backend& model) const {
  for (const auto& [name, tensor] : tensors_)
    model.load(name, tensor.values.data(), tensor.rows, tensor.columns);
  model.finish();
}

std::vector<int32_t> TinyModel::random_tokens(int32_t count, uint32_t seed) const {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < count; ++i)
    tokens.push_back(static_cast<int32_t>(random() % static_cast<uint32_t>(shape_.vocab_size)));
  return tokens;
}

// ---- the plain transformer

std::vector<double> TinyModel::norm(const std::vector<double>& x, const std::string& weight) const {
  const double scale = reference::inverse_rms(x, shape_.rms_eps);
  std::vector<double> out;
  for (size_t i = 0; i < x.size(); ++i)
    out.push_back(x[i] * scale * tensor(weight).values[i]);
  return out;
}

std::vector<double> TinyModel::project(const std::vector<double>& x,
                                       const std::string& weight) const {
  const Tensor& w = tensor(weight);
  if (w.is_fp8) {
    const std::vector<float> row(x.begin(), x.end());
    return products(quantised(row), w);
  }
  return products(x, w);
}

std::vector<double> TinyModel::products(const std::vector<double>& x, const Tensor& w) {
  std::vector<double> out;
  for (int64_t row = 0; row < w.rows; ++row) {
    const double* weights = w.rounded.data() + row * w.columns;
    double sum = 0;
    for (int64_t i = 0; i < w.columns; ++i)
      sum += x.data()[i] * weights[i];
    out.push_back(sum);
  }
  return out;
}

// Queries, keys or values of one token, by head. The product is rounded before its bias is added.
std::vector<std::vector<double>> TinyModel::heads(const std::vector<double>& x,
                                                  const std::string& layer, const std::string& name,
                                                  int64_t position) const {
  std::vector<double> all = rounded(project(x, layer + name));
  for (size_t i = 0; has(layer + name + "_bias") && i < all.size(); ++i)
    all[i] += tensor(layer + name + "_bias").values[i];
  const auto dim = static_cast<size_t>(shape_.head_dim);
  std::vector<std::vector<double>> out;
  for (size_t begin = 0; begin < all.size(); begin += dim) {
    std::vector<double> head(all.begin() + static_cast<ptrdiff_t>(begin),
                             all.begin() + static_cast<ptrdiff_t>(begin + dim));
    if (name != "v") {
      if (has(layer + name + "_norm"))
        head = norm(head, layer + name + "_norm");
      std::vector<double> cos;
      std::vector<double> sin;
      for (int32_t i = 0; i < shape_.head_dim / 2; ++i) {
        const double angle = static_cast<double>(position) * shape_.inverse_frequency(i);
        cos.push_back(std::cos(angle));
        sin.push_back(std::sin(angle));
      }
      reference::rotate(head, cos, sin);
    }
    // Queries are stored scaled, in base 2.
    const double scale =
        name == "q" ? std::log2(std::exp(1.0)) / std::sqrt(static_cast<double>(dim)) : 1.0;
    for (double& value : head)
      value *= scale;
    out.push_back(rounded(head));
  }
  return out;
}

// The last token's attention over keys[position][kv head].
std::vector<double> TinyModel::attend(const Rows& queries, const std::vector<Rows>& keys,
                                      const std::vector<Rows>& values, int32_t window) const {
  std::vector<double> out;
  const size_t group = queries.size() / keys.front().size();
  const auto count = static_cast<int32_t>(keys.size());
  const int32_t first = window > 0 ? std::max(0, count - window) : 0;
  for (size_t h = 0; h < queries.size(); ++h) {
    const auto of = [&](const std::vector<Rows>& rows, int32_t token) -> const auto& {
      return rows[static_cast<size_t>(token)][h / group];
    };
    const auto score = [&](int32_t key) {
      return std::inner_product(queries[h].begin(), queries[h].end(), of(keys, key).begin(), 0.0);
    };
    const auto value = [&](int32_t key, size_t i) { return of(values, key)[i]; };
    const auto mixed =
        reference::attended(first, count, static_cast<size_t>(shape_.head_dim), score, value);
    out.insert(out.end(), mixed.begin(), mixed.end());
  }
  return rounded(out);
}

TinyModel::LayerCache TinyModel::run_layer(int32_t index, Rows& hidden) const {
  const std::string layer = "layers." + std::to_string(index) + ".";
  const auto add_bias = [&](std::vector<double>& x, const std::string& name) {
    for (size_t i = 0; has(layer + name) && i < x.size(); ++i)
      x[i] += tensor(layer + name).values[i];
  };
  LayerCache cache;
  for (size_t t = 0; t < hidden.size(); ++t) {
    const std::vector<double> x = rounded(norm(hidden[t], layer + "attn_norm"));
    const auto position = static_cast<int64_t>(t);
    cache.keys.push_back(heads(x, layer, "k", position));
    cache.values.push_back(heads(x, layer, "v", position));
    const std::vector<double> context =
        attend(heads(x, layer, "q", position), cache.keys, cache.values, shape_.window(index));
    std::vector<double> out = project(context, layer + "o");
    add_bias(out, "o_bias");
    add_to(hidden[t], out);
  }
  for (std::vector<double>& row : hidden) {
    const std::vector<double> x = rounded(norm(row, layer + "mlp_norm"));
    std::vector<double> gate = project(x, layer + "gate");
    std::vector<double> up = project(x, layer + "up");
    add_bias(gate, "gate_bias");
    add_bias(up, "up_bias");
    for (size_t i = 0; i < gate.size(); ++i)
      gate[i] = bf16(reference::silu(gate[i]) * up[i]);
    std::vector<double> down = project(gate, layer + "down");
    add_bias(down, "down_bias");
    add_to(row, down);
  }
  return cache;
}

TinyModel::Rows TinyModel::embedded(const std::vector<int32_t>& tokens) const {
  Rows hidden;
  const auto width = static_cast<ptrdiff_t>(shape_.hidden_size);
  for (const int32_t token : tokens) {
    const auto row = tensor("embed").values.begin() + token * width;
    hidden.push_back(rounded({row, row + width}));
  }
  return hidden;
}

TinyModel::KeysAndValues TinyModel::keys_and_values(const std::vector<int32_t>& tokens) const {
  Rows hidden = embedded(tokens);
  KeysAndValues layers;
  for (int32_t i = 0; i < shape_.num_layers; ++i)
    layers.push_back(run_layer(i, hidden));
  return layers;
}

std::vector<float> TinyModel::logits(const std::vector<int32_t>& tokens) const {
  Rows hidden = embedded(tokens);
  for (int32_t i = 0; i < shape_.num_layers; ++i)
    run_layer(i, hidden);
  const std::vector<double> last = rounded(norm(hidden.back(), "final_norm"));
  const std::vector<double> logits = project(last, shape_.tie_embeddings ? "embed" : "lm_head");
  return {logits.begin(), logits.end()};
}

}  // namespace flowprefill::testing
