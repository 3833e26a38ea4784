#include "devices/cuda/backend/device_weights.h"

#include <numbers>
#include <stdexcept>
#include <utility>

namespace flowprefill {
namespace {

constexpr size_t kAlignment = 256;

void require(bool holds, const char* field, int64_t value, const char* allowed) {
  if (!holds) {
    throw std::invalid_argument(std::string(field) + ": got " + std::to_string(value) +
                                ", expected " + allowed + " on CUDA");
  }
}

ModelConfig checked(ModelConfig c) {
  check(c);
  require(c.hidden_size % 8 == 0, "hidden_size", c.hidden_size, "a multiple of 8");
  require(c.intermediate_size % 8 == 0, "intermediate_size", c.intermediate_size,
          "a multiple of 8");
  require(c.head_dim == 64 || c.head_dim == 96 || c.head_dim == 128, "head_dim", c.head_dim,
          "64, 96 or 128");
  for (const int32_t window : c.windows)
    require(window >= 0, "windows", window, "at least 0");
  return c;
}

std::string shape_text(int64_t rows, int64_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

}  // namespace

int32_t DeviceWeights::padded_vocab(const ModelConfig& config) {
  return (config.vocab_size + 7) / 8 * 8;
}

// Laid out twice: without memory to count the bytes, then in it.
DeviceWeights::DeviceWeights(const ModelConfig& config, int device, size_t piece_bytes)
    : config_(checked(config)),
      padded_vocab_(padded_vocab(config)),
      uploader_(std::make_unique<Uploader>(device, piece_bytes)),
      memory_(0) {
  lay_out();
  memory_ = DeviceBuffer(used_);
  lay_out();
  for (const auto& [name, place] : places_)
    missing_.insert(name);
  std::vector<double> turns;
  turns.reserve(config_.inverse_frequencies.size());
  for (const double frequency : config_.inverse_frequencies)
    turns.push_back(frequency / (2 * std::numbers::pi));
  uploader_->raw(turns.data(), turns.size() * sizeof(double), const_cast<double*>(turns_));
}

// ---- layout

std::byte* DeviceWeights::take(size_t bytes) {
  std::byte* place = memory_.get() == nullptr ? nullptr : memory_.get() + used_;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return place;
}

void DeviceWeights::add(const std::string& name, const void* to, int64_t rows, int64_t columns,
                        int64_t row_stride) {
  places_[name] = {.rows = rows,
                   .columns = columns,
                   .to = const_cast<void*>(to),
                   .row_stride = row_stride > 0 ? row_stride : columns,
                   .is_vector = columns == 1};
}

const Bf16* DeviceWeights::matrix(const std::string& name, int64_t rows, int64_t columns) {
  const auto* to = reinterpret_cast<const Bf16*>(
      take(sizeof(Bf16) * static_cast<size_t>(rows) * static_cast<size_t>(columns)));
  if (!name.empty())
    add(name, to, rows, columns);
  return to;
}

const float* DeviceWeights::vector(const std::string& name, int64_t count) {
  const auto* to = reinterpret_cast<const float*>(take(sizeof(float) * static_cast<size_t>(count)));
  if (!name.empty())
    add(name, to, count, 1);
  return to;
}

void DeviceWeights::lay_out() {
  const ModelConfig& c = config_;
  used_ = 0;
  places_.clear();
  layers_.assign(static_cast<size_t>(c.num_layers), {});
  const auto vocabulary = [&](const std::string& name) {
    const Bf16* to = matrix("", padded_vocab_, c.hidden_size);
    add(name, to, c.vocab_size, c.hidden_size);
    return to;
  };
  embed_ = vocabulary("embed");
  head_ = c.tie_embeddings ? embed_ : vocabulary("lm_head");
  final_norm_ = vector("final_norm", c.hidden_size);
  turns_ =
      reinterpret_cast<const double*>(take(sizeof(double) * static_cast<size_t>(c.head_dim / 2)));
  for (int32_t i = 0; i < c.num_layers; ++i)
    lay_out_layer(i);
}

void DeviceWeights::lay_out_layer(int32_t index) {
  const ModelConfig& c = config_;
  DeviceLayer& w = layers_[static_cast<size_t>(index)];
  const std::string layer = "layers." + std::to_string(index) + ".";
  const int64_t hidden = c.hidden_size;
  const int64_t inner = c.intermediate_size;
  const int64_t q = c.q_columns();
  const int64_t kv = c.kv_columns();

  w.attn_norm = vector(layer + "attn_norm", hidden);
  w.qkv = matrix("", c.qkv_columns(), hidden);
  add(layer + "q", w.qkv, q, hidden);
  add(layer + "k", w.qkv + q * hidden, kv, hidden);
  add(layer + "v", w.qkv + (q + kv) * hidden, kv, hidden);
  if (c.qkv_bias) {
    w.qkv_bias = vector("", c.qkv_columns());
    add(layer + "q_bias", w.qkv_bias, q, 1);
    add(layer + "k_bias", w.qkv_bias + q, kv, 1);
    add(layer + "v_bias", w.qkv_bias + q + kv, kv, 1);
  }
  if (c.qk_norm) {
    w.q_norm = vector(layer + "q_norm", c.head_dim);
    w.k_norm = vector(layer + "k_norm", c.head_dim);
  }
  w.o = matrix(layer + "o", hidden, q);
  if (c.o_bias)
    w.o_bias = vector(layer + "o_bias", hidden);
  w.mlp_norm = vector(layer + "mlp_norm", hidden);
  w.gate_up = matrix("", 2 * inner, hidden);
  add(layer + "gate", w.gate_up, inner, hidden, 2 * hidden);
  add(layer + "up", w.gate_up + hidden, inner, hidden, 2 * hidden);
  w.down = matrix(layer + "down", hidden, inner);
  if (c.mlp_bias) {
    w.gate_up_bias = vector("", 2 * inner);
    add(layer + "gate_bias", w.gate_up_bias, inner, 1, 2);
    add(layer + "up_bias", w.gate_up_bias + 1, inner, 1, 2);
    w.down_bias = vector(layer + "down_bias", hidden);
  }
}

// ---- loading

void DeviceWeights::load(const std::string& name, const float* values, int64_t rows,
                         int64_t columns) {
  if (uploader_ == nullptr)
    throw std::logic_error("load() after finish()");
  const auto found = places_.find(name);
  if (found == places_.end())
    throw std::invalid_argument("tensor " + name + ": the config has no tensor of this name");
  const Place& place = found->second;
  if (rows != place.rows || columns != place.columns) {
    throw std::invalid_argument("tensor " + name + ": got shape " + shape_text(rows, columns) +
                                ", expected " + shape_text(place.rows, place.columns));
  }
  if (place.is_vector) {
    uploader_->vector(values, rows, static_cast<float*>(place.to), place.row_stride);
  } else {
    uploader_->matrix(values, rows, columns, static_cast<Bf16*>(place.to), place.row_stride);
  }
  missing_.erase(name);
}

void DeviceWeights::finish() {
  if (!missing_.empty()) {
    const Place& place = places_.at(*missing_.begin());
    throw std::invalid_argument("tensor " + *missing_.begin() + ": missing, expected shape " +
                                shape_text(place.rows, place.columns));
  }
  if (uploader_ != nullptr)
    uploader_->finish();
  uploader_.reset();
}

}  // namespace flowprefill
