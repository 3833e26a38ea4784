// DeviceWeights: a model's weights on the GPU as the kernels read them. Filled through
// CudaBackend::load(), then read-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "devices/cuda/backend/cuda_backend_options.h"
#include "devices/cuda/backend/uploader.h"
#include "devices/cuda/kernels/fp8.h"
#include "devices/cuda/runtime/memory.h"
#include "graph/model_graph.h"

namespace flowprefill {

// Which weights stay in e4m3, by index: see CudaBackendOptions.
std::vector<bool> fp8_weights(const ModelGraph& graph, const CudaBackendOptions& options);

class DeviceWeights {
 public:
  static constexpr size_t kPieceBytes = size_t{8} << 20;

  // Takes memory for all weights at once. graph: lives as long as this. is_fp8: by weight, of
  // fp8_weights(); empty: none. Throws CudaError.
  DeviceWeights(const ModelGraph& graph, int device, size_t piece_bytes = kPieceBytes,
                std::vector<bool> is_fp8 = {});

  // See Backend.
  void load(const std::string& source, const float* values, int64_t rows, int64_t columns);
  // A row: its e4m3 codes, then a float, their scale. Not for tensors of vectors.
  void load_blocks(const std::string& source, const uint8_t* bytes, int64_t rows,
                   int64_t row_bytes);
  void finish();

  // What a weight takes here.
  static size_t bytes_of(const Weight& weight, bool is_fp8);

  bool is_fp8(int32_t weight) const { return is_fp8_[static_cast<size_t>(weight)]; }
  // Of a weight that is FP8, instead of matrix(): codes [rows, columns] and their scales [rows].
  const E4m3* codes(int32_t weight) const { return at<E4m3>(places_, weight); }
  const float* scales(int32_t weight) const { return at<float>(scales_, weight); }

  // By index into the graph's weights; device pointers. [rows, columns] as checkpoints have them,
  // dense, with zeros up to a multiple of 8 rows, as the products want them; paired: gate 0, up 0,
  // gate 1, up 1, ... A table and a matrix of the same tensor are one (tied embeddings).
  const Bf16* matrix(int32_t weight) const { return at<Bf16>(places_, weight); }
  // Null for index -1. With the zeros of a matrix.
  const float* vector(int32_t weight) const {
    return weight < 0 ? nullptr : at<float>(places_, weight);
  }
  // Of a rotary table of the graph: turns of each pair of dimensions from one position to the next.
  const double* turns_per_position(int32_t table) const { return at<double>(turns_, table); }

  size_t bytes() const { return memory_.bytes(); }

 private:
  template <typename T>
  T* at(const std::vector<size_t>& places, int32_t index) const {
    return reinterpret_cast<T*>(memory_.get() + places[static_cast<size_t>(index)]);
  }

  size_t take(size_t bytes);
  void lay_out();
  // Where a part's rows begin in its weight, and how far they lie apart.
  struct PartRows {
    int64_t first = 0;
    int64_t step = 1;
  };
  PartRows rows_of(const Weight& weight, int32_t part) const;
  void put(int32_t weight, int32_t part, const float* values);
  void put_blocks(int32_t weight, int32_t part, const uint8_t* bytes, int64_t row_bytes);
  void put_vector(const Weight& weight, const float* values, int64_t rows, float* to,
                  int64_t stride);

  const ModelGraph& graph_;
  std::unique_ptr<Uploader> uploader_;  // until finish()
  DeviceBuffer memory_;
  size_t used_ = 0;              // of it, while laying out
  std::vector<size_t> places_;   // by weight: offset of its first row
  std::vector<bool> is_shared_;  // by weight: its values come with an earlier one
  std::vector<bool> is_fp8_;     // by weight
  std::vector<size_t> scales_;   // by weight: offset of the scales of one that is FP8
  std::vector<size_t> turns_;    // by rotary table
  std::set<std::string> arrived_;
};

}  // namespace flowprefill
