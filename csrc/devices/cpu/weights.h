// Weights: a model's tensors, packed as they arrive. Filled by the bindings at load, then
// read-only.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "devices/cpu/packed_linear.h"
#include "devices/cpu/team.h"
#include "graph/model_config.h"

namespace flowprefill {

// Gate and up columns alternate in runs of this many, so that one product block holds both halves
// of SwiGLU.
inline constexpr int32_t kGateColumns = kPackColumns / 2;

template <typename T>
struct LayerWeights {
  std::vector<float> attn_norm, mlp_norm, q_norm, k_norm;
  std::vector<float> qkv_bias, o_bias, gate_up_bias, down_bias;
  PackedLinear<T> qkv, o, gate_up, down;
};

template <typename T>  // T: float or Bf16
class Weights {
 public:
  // threads: that load together, until finish().
  Weights(ModelConfig config, int threads);

  // Takes one tensor by its canonical name ("layers.3.q", "embed", ...): float, row-major, rows *
  // columns values (columns 1 for vectors). Throws std::invalid_argument for an unknown name or a
  // wrong shape.
  void load(const std::string& name, const float* values, int64_t rows, int64_t columns);

  // Checks that everything has arrived; throws std::invalid_argument naming what is missing.
  void finish();

  const ModelConfig& config() const { return config_; }
  const LayerWeights<T>& layer(int32_t index) const { return layers_[static_cast<size_t>(index)]; }
  const T* embedding(int32_t token) const {
    return embed_.as<T>() + int64_t{token} * config_.hidden_size;
  }
  const std::vector<float>& final_norm() const { return final_norm_; }
  const PackedLinear<T>& head() const { return head_; }
  size_t bytes() const;

 private:
  using Order = std::function<int64_t(int64_t)>;
  struct Place {
    PackedLinear<T>* matrix;     // or
    std::vector<float>* vector;  // whichever it is
    int64_t rows;                // of the tensor
    Order order;                 // its row -> column of the matrix, element of the vector
  };

  std::map<std::string, Place> places(LayerWeights<T>& layer);
  void load_layer(LayerWeights<T>& layer, const std::string& name, const float* values,
                  int64_t rows, int64_t columns);
  void load_embedding(const float* values);
  int64_t gate_up_column(int64_t index, bool is_up) const;

  ModelConfig config_;
  std::unique_ptr<Team> team_;  // until finish()
  Buffer embed_;
  std::vector<LayerWeights<T>> layers_;
  std::vector<float> final_norm_;
  PackedLinear<T> head_;
  std::set<std::string> loaded_;
};

}  // namespace flowprefill
