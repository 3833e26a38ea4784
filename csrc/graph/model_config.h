// ModelConfig: shape and constants of a decoder model as the native side needs them (see
// flowprefill/models/model_config.py for where they come from).
#pragma once

#include <cstdint>
#include <vector>

namespace flowprefill {

struct ModelConfig {
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t intermediate_size = 0;
  int32_t num_layers = 0;
  int32_t num_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float rms_eps = 0;
  bool tie_embeddings = false;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;
  std::vector<int32_t> windows;             // [num_layers] keys a token sees, 0: all
  std::vector<double> inverse_frequencies;  // [head_dim / 2] rotary, all scaling applied
  double rope_attention_scale = 1.0;        // multiplies cos and sin (yarn)

  int32_t q_columns() const { return num_heads * head_dim; }
  int32_t kv_columns() const { return num_kv_heads * head_dim; }
  int32_t qkv_columns() const { return q_columns() + 2 * kv_columns(); }
};

// Throws std::invalid_argument naming the field, its value and what is allowed.
void check(const ModelConfig& config);

}  // namespace flowprefill
