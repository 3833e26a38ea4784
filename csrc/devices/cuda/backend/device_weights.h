// DeviceWeights: a model's tensors on the GPU as the kernels read them. Filled through
// CudaModel::load(), then read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "devices/cuda/backend/uploader.h"
#include "devices/cuda/kernels/portable.h"
#include "devices/cuda/runtime/memory.h"
#include "graph/model_config.h"

namespace flowprefill {

// Of one layer; device pointers, null where the config says there is none. Matrices are
// [out, in] as checkpoints have them, dense.
struct DeviceLayer {
  const float* attn_norm = nullptr;
  const float* mlp_norm = nullptr;
  const float* q_norm = nullptr;
  const float* k_norm = nullptr;
  const Bf16* qkv = nullptr;  // queries, keys, values one below the other
  const float* qkv_bias = nullptr;
  const Bf16* o = nullptr;
  const float* o_bias = nullptr;
  const Bf16* gate_up = nullptr;  // gate 0, up 0, gate 1, up 1, ...
  const float* gate_up_bias = nullptr;
  const Bf16* down = nullptr;
  const float* down_bias = nullptr;
};

class DeviceWeights {
 public:
  static constexpr size_t kPieceBytes = size_t{8} << 20;

  // Takes memory for all tensors at once. Throws std::invalid_argument for a shape that no kernel
  // takes, CudaError.
  DeviceWeights(const ModelConfig& config, int device, size_t piece_bytes = kPieceBytes);

  // See CudaModel.
  void load(const std::string& name, const float* values, int64_t rows, int64_t columns);
  void finish();

  const DeviceLayer& layer(int32_t index) const { return layers_[static_cast<size_t>(index)]; }
  const Bf16* embed() const { return embed_; }
  const float* final_norm() const { return final_norm_; }
  const Bf16* head() const { return head_; }  // [padded_vocab, hidden]; the embedding if tied
  // Rows of the head: the vocabulary and zeros up to a multiple of 8, as the products want them.
  int32_t padded_vocab() const { return padded_vocab_; }
  const double* turns_per_position() const {
    return turns_;
  }  // [head_dim / 2] for the rotary table
  size_t bytes() const { return memory_.bytes(); }

  static int32_t padded_vocab(const ModelConfig& config);

 private:
  // Where a tensor of the checkpoint goes.
  struct Place {
    int64_t rows;
    int64_t columns;     // 1: a vector of floats
    void* to;            // of its first row; null until the memory is there
    int64_t row_stride;  // elements
    bool is_vector;
  };

  std::byte* take(size_t bytes);
  void lay_out();
  void lay_out_layer(int32_t index);
  const Bf16* matrix(const std::string& name, int64_t rows, int64_t columns);
  const float* vector(const std::string& name, int64_t count);
  void add(const std::string& name, const void* to, int64_t rows, int64_t columns,
           int64_t row_stride = 0);

  const ModelConfig config_;
  const int32_t padded_vocab_;
  std::unique_ptr<Uploader> uploader_;  // until finish()
  DeviceBuffer memory_;
  size_t used_ = 0;  // of it, while laying out
  std::map<std::string, Place> places_;
  std::set<std::string> missing_;

  std::vector<DeviceLayer> layers_;
  const Bf16* embed_ = nullptr;
  const Bf16* head_ = nullptr;
  const float* final_norm_ = nullptr;
  const double* turns_ = nullptr;
};

}  // namespace flowprefill
