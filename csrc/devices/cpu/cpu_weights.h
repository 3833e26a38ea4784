// CpuWeights: a model's weights, each brought into the form that the CPU multiplies as it arrives.
// Filled through CpuBackend at load, then read-only.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <variant>
#include <vector>

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
  // Takes all memory. threads: that load together, until finish().
  CpuWeights(std::shared_ptr<const ModelGraph> graph, const MakeLinear<T>& make_linear,
             int threads);

  // See Backend.
  void load(const std::string& source, const float* values, int64_t rows, int64_t columns);
  void finish();

  // By index into the graph's weights.
  const Linear<T>& matrix(int32_t weight) const {
    return *std::get<Matrix>(storage_[static_cast<size_t>(weight)]);
  }
  const T* table_row(int32_t weight, int32_t row) const {
    return std::get<Buffer>(storage_[static_cast<size_t>(weight)]).template as<T>() +
           int64_t{row} * graph_->weights.weight(weight).columns;
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

  void put(int32_t weight, int32_t part, const float* values);

  const std::shared_ptr<const ModelGraph> graph_;
  std::unique_ptr<Team> team_;  // until finish()
  std::vector<std::variant<std::vector<float>, Buffer, Matrix>> storage_;
  std::set<std::string> arrived_;
};

}  // namespace flowprefill
