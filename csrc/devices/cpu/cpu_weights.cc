#include "devices/cpu/cpu_weights.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace flowprefill {
namespace {

// Where row `row` of a part goes: a column of the packed matrix, an element of the vector.
std::function<int64_t(int64_t)> places(const Weight& weight, int32_t part) {
  if (weight.order == PartOrder::kStacked) {
    int64_t first = 0;
    for (int32_t i = 0; i < part; ++i)
      first += weight.parts[static_cast<size_t>(i)].rows;
    return [first](int64_t row) { return first + row; };
  }
  const int64_t inner = weight.parts.front().rows;
  return [inner, is_up = part == 1](int64_t row) {
    const int64_t run = row / kGateColumns;
    const int64_t width = std::min<int64_t>(kGateColumns, inner - run * kGateColumns);
    return run * kPackColumns + (is_up ? width : 0) + row % kGateColumns;
  };
}

}  // namespace

template <typename T>
CpuWeights<T>::CpuWeights(std::shared_ptr<const ModelGraph> graph, const MakeLinear<T>& make_linear,
                          int threads)
    : graph_(std::move(graph)), team_(std::make_unique<Team>(threads)) {
  for (const Weight& weight : graph_->weights.weights()) {
    switch (weight.kind) {
      case WeightKind::kMatrix:
        storage_.emplace_back(make_linear(*graph_, static_cast<int32_t>(storage_.size())));
        break;
      case WeightKind::kTable:
        storage_.emplace_back(
            Buffer(sizeof(T) * static_cast<size_t>(weight.rows() * weight.columns)));
        break;
      case WeightKind::kVector:
        storage_.emplace_back(std::vector<float>(static_cast<size_t>(weight.rows())));
        break;
    }
  }
}

template <typename T>
void CpuWeights<T>::load(const std::string& source, const float* values, int64_t rows,
                         int64_t columns) {
  if (team_ == nullptr)
    throw std::logic_error("tensor " + source + ": loaded after finish()");
  graph_->weights.deal(source, values, rows, columns,
                       [this](int32_t weight, int32_t part, const float* part_values) {
                         put(weight, part, part_values);
                       });
  arrived_.insert(source);
}

template <typename T>
void CpuWeights<T>::finish() {
  graph_->weights.require_all(arrived_);
  team_.reset();
}

template <typename T>
void CpuWeights<T>::put(int32_t index, int32_t part, const float* values) {
  const Weight& weight = graph_->weights.weight(index);
  const int64_t rows = weight.parts[static_cast<size_t>(part)].rows;
  const auto place = places(weight, part);
  auto& storage = storage_[static_cast<size_t>(index)];
  if (auto* matrix = std::get_if<Matrix>(&storage)) {
    (*matrix)->pack(values, rows, *team_, place);
  } else if (auto* table = std::get_if<Buffer>(&storage)) {
    const auto width = static_cast<int>(weight.columns);
    team_->for_each(rows, [&](int64_t row) {
      row_kernels<T>().narrow(values + row * width, width,
                              table->template as<T>() + place(row) * width);
    });
  } else {
    auto& vector = std::get<std::vector<float>>(storage);
    for (int64_t row = 0; row < rows; ++row)
      vector[static_cast<size_t>(place(row))] = values[row] + weight.offset;
  }
}

template <typename T>
size_t CpuWeights<T>::bytes() const {
  size_t total = 0;
  for (const auto& storage : storage_) {
    if (const auto* matrix = std::get_if<Matrix>(&storage))
      total += (*matrix)->bytes();
    else if (const auto* table = std::get_if<Buffer>(&storage))
      total += table->bytes();
    else
      total += std::get<std::vector<float>>(storage).size() * sizeof(float);
  }
  return total;
}

template class CpuWeights<float>;
template class CpuWeights<Bf16>;

}  // namespace flowprefill
