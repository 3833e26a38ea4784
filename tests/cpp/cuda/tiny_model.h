// TinyModel: a small decoder with random weights, and what it computes, by a plain transformer that
// shares nothing with csrc/devices/cuda but the places where numbers are rounded to bf16. Used by
// the tests of CudaBackend.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "graph/backend.h"
#include "graph_fixture.h"

namespace flowprefill::testing {

enum class Kind { kLlama, kQwen, kWindow, kTied };

class TinyModel {
 public:
  // kLlama: grouped queries. kQwen: head norms and every bias. kWindow: sliding windows of 16 and 9
  // in two of three layers. kTied: no lm_head. The vocabulary, 203, is a multiple of nothing.
  explicit TinyModel(Kind kind, int32_t num_layers = 2, uint32_t seed = 1);

  const LlamaShape& shape() const { return shape_; }
  ModelGraph graph() const { return llama_graph(shape_); }
  void load_into(Backend& model) const;
  // From here on logits() rounds weights of the layers' products, and what is multiplied with them,
  // to e4m3 by rows, where the sides are multiples of 16.
  void quantise();

  // Logits after the last of the tokens, computed from the first one on: [vocab].
  std::vector<float> logits(const std::vector<int32_t>& tokens) const;

  using Rows = std::vector<std::vector<double>>;
  struct LayerCache {
    std::vector<Rows> keys = {};  // [token][KV head][dimension]
    std::vector<Rows> values = {};
  };
  using KeysAndValues = std::vector<LayerCache>;  // by layer
  // What the tokens leave in the cache.
  KeysAndValues keys_and_values(const std::vector<int32_t>& tokens) const;

  std::vector<int32_t> random_tokens(int32_t count, uint32_t seed) const;

 private:
  struct Tensor {
    int64_t rows = 0;
    int64_t columns = 0;
    std::vector<float> values = {};
    std::vector<double> rounded = {};  // to bf16, or to e4m3; of matrices
    bool is_fp8 = false;
  };

  void add(const std::string& name, int64_t rows, int64_t columns, float scale, float mean = 0);
  const Tensor& tensor(const std::string& name) const { return tensors_.at(name); }
  bool has(const std::string& name) const { return tensors_.contains(name); }
  std::vector<double> norm(const std::vector<double>& x, const std::string& weight) const;
  std::vector<double> project(const std::vector<double>& x, const std::string& weight) const;
  static std::vector<double> products(const std::vector<double>& x, const Tensor& weight);
  std::vector<std::vector<double>> heads(const std::vector<double>& x, const std::string& layer,
                                         const std::string& name, int64_t position) const;
  std::vector<double> attend(const Rows& queries, const std::vector<Rows>& keys,
                             const std::vector<Rows>& values, int32_t window) const;
  Rows embedded(const std::vector<int32_t>& tokens) const;
  LayerCache run_layer(int32_t index, Rows& hidden) const;

  LlamaShape shape_;
  uint32_t seed_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace flowprefill::testing
