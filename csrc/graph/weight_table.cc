#include "graph/weight_table.h"

#include <algorithm>
#include <stdexcept>

namespace flowprefill {
namespace {

[[noreturn]] void invalid(const std::string& message) {
  throw std::invalid_argument(message);
}

std::string shape_text(int64_t rows, int64_t columns) {
  return "[" + std::to_string(rows) + ", " + std::to_string(columns) + "]";
}

// Whether the first half has the rows of the second, part by part.
bool are_pairs(const std::vector<WeightPart>& parts) {
  const auto middle = parts.begin() + static_cast<ptrdiff_t>(parts.size() / 2);
  return parts.size() % 2 == 0 && std::equal(parts.begin(), middle, middle, parts.end(),
                                             [](const WeightPart& gate, const WeightPart& up) {
                                               return gate.rows == up.rows;
                                             });
}

void check(const Weight& weight) {
  const std::string name = "weight " + weight.name + ": ";
  if (weight.parts.empty())
    invalid(name + "parts: got none, expected at least 1");
  if (weight.columns < 1)
    invalid(name + "columns: got " + std::to_string(weight.columns) + ", expected at least 1");
  if (weight.kind == WeightKind::kVector && weight.columns != 1)
    invalid(name + "columns: got " + std::to_string(weight.columns) + ", expected 1 of a vector");
  for (const WeightPart& part : weight.parts) {
    if (part.rows < 1 || part.first_row < 0) {
      invalid(name + "part " + part.source + ": got rows " + std::to_string(part.first_row) + ".." +
              std::to_string(part.first_row + part.rows) + ", expected at least one");
    }
  }
  if (weight.order == PartOrder::kPaired && !are_pairs(weight.parts))
    invalid(name + "order: got paired, expected two parts of equal rows for it");
}

}  // namespace

int64_t Weight::rows() const {
  int64_t total = 0;
  for (const WeightPart& part : parts)
    total += part.rows;
  return total;
}

WeightTable::WeightTable(std::vector<Weight> weights) : weights_(std::move(weights)) {
  for (size_t i = 0; i < weights_.size(); ++i) {
    const Weight& weight = weights_[i];
    check(weight);
    if (!index_.emplace(weight.name, static_cast<int32_t>(i)).second)
      invalid("weight " + weight.name + ": named twice");
    for (size_t part = 0; part < weight.parts.size(); ++part) {
      std::vector<Use>& uses = uses_[weight.parts[part].source];
      if (uses.empty())
        sources_.push_back(weight.parts[part].source);
      uses.push_back({.weight = static_cast<int32_t>(i), .part = static_cast<int32_t>(part)});
    }
  }
}

int32_t WeightTable::index(const std::string& name) const {
  const auto found = index_.find(name);
  if (found == index_.end())
    invalid("weight " + name + ": the graph has none of this name");
  return found->second;
}

int64_t WeightTable::rows_of(const std::string& source) const {
  int64_t rows = 0;
  for (const Use& use : uses_.at(source)) {
    const WeightPart& part = weight(use.weight).parts[static_cast<size_t>(use.part)];
    rows = std::max(rows, part.first_row + part.rows);
  }
  return rows;
}

void WeightTable::check_shape(const std::string& source, int64_t rows, int64_t columns) const {
  const int64_t wanted = weight(uses_.at(source).front().weight).columns;
  if (rows != rows_of(source) || columns != wanted) {
    invalid("tensor " + source + ": got shape " + shape_text(rows, columns) + ", expected " +
            shape_text(rows_of(source), wanted));
  }
}

void WeightTable::each_use(const std::string& source, int64_t rows, int64_t columns,
                           const UseSink& sink) const {
  const auto found = uses_.find(source);
  if (found == uses_.end())
    invalid("tensor " + source + ": the model has no tensor of this name");
  check_shape(source, rows, columns);
  for (const Use& use : found->second)
    sink(use.weight, use.part);
}

void WeightTable::deal(const std::string& source, const float* values, int64_t rows,
                       int64_t columns, const Sink& sink) const {
  each_use(source, rows, columns, [&](int32_t index, int32_t part) {
    const int64_t first_row = weight(index).parts[static_cast<size_t>(part)].first_row;
    sink(index, part, values + first_row * columns);
  });
}

void WeightTable::require_all(const std::set<std::string>& arrived) const {
  for (const std::string& source : sources_) {
    if (!arrived.contains(source)) {
      const int64_t columns = weight(uses_.at(source).front().weight).columns;
      invalid("tensor " + source + ": missing, expected shape " +
              shape_text(rows_of(source), columns));
    }
  }
}

}  // namespace flowprefill
