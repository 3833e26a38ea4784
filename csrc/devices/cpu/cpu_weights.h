// CpuWeights: a model's weights, each brought into the form that the CPU multiplies as it arrives.
// Filled through CpuBackend at load, then read-only.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "devices/cpu/block_matrix.h"
#include "devices/cpu/buffer.h"
#include "devices/cpu/linear.h"
#include "devices/cpu/team.h"
#include "graph/model_graph.h"

namespace flowprefill {

// Gate and up columns alternate in runs of this many, so that one product block holds both halves
// of a gate.
inline constexpr int32_t kGateColumns = kPackColumns / 2;

template <typename T>  // T: float or Bf16
class CpuWeights {
 public:
  // Takes all memory. threads: that load together, until finish(). formats: a weight all of whose
  // parts are in there stays in blocks, unless 16 columns of it would be of different formats.
  CpuWeights(std::shared_ptr<const ModelGraph> graph, const MakeLinear<T>& make_linear, int threads,
             BlockFormats formats = {});

  // See Backend.
  void load(const std::string& source, const float* values, int64_t rows, int64_t columns);
  void load_blocks(const std::string& source, const uint8_t* bytes, int64_t rows,
                   int64_t row_bytes);
  void finish();

  // By index into the graph's weights.
  const Linear<T>& matrix(int32_t weight) const {
    return *std::get<Matrix>(storage_[static_cast<size_t>(weight)]);
  }
  // out[columns]: one row of a table.
  void look_up(int32_t weight, int32_t row, float* out) const;
  // Whether it stays in quantised blocks.
  bool is_in_blocks(int32_t weight) const {
    return blocks_[static_cast<size_t>(weight)] != nullptr;
  }
  // Null for index -1.
  const float* vector(int32_t weight) const {
    if (weight < 0)
      return nullptr;
    return std::get<std::vector<float>>(storage_[static_cast<size_t>(weight)]).data();
  }
  size_t bytes() const;

 private:
  using Matrix = std::unique_ptr<Linear<T>>;

  std::shared_ptr<BlockMatrix> make_blocks(int32_t weight) const;
  void put(int32_t weight, int32_t part, const float* values);
  // Of the weights that share their blocks, whose rows are the same, whether it is the first.
  bool is_first_of_blocks(int32_t index) const;
  void put_blocks(int32_t weight, int32_t part, const BlockRows& rows);

  const std::shared_ptr<const ModelGraph> graph_;
  const BlockFormats formats_;
  std::unique_ptr<Team> team_;  // until finish()
  // Of weights in blocks; a table and a matrix of the same tensor share them.
  std::vector<std::shared_ptr<BlockMatrix>> blocks_;
  std::vector<std::variant<std::vector<float>, Buffer, Matrix>> storage_;
  std::set<std::string> arrived_;
};

}  // namespace flowprefill
