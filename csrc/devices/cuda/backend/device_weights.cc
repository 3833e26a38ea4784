#include "devices/cuda/backend/device_weights.h"

#include <map>
#include <numbers>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "devices/cuda/backend/plan_shape.h"

namespace flowprefill {
namespace {

constexpr size_t kAlignment = 256;

size_t bytes_of(const Weight& weight) {
  const auto rows = static_cast<size_t>(padded_to_8(weight.rows()));
  if (weight.kind == WeightKind::kVector)
    return rows * sizeof(float);
  return rows * static_cast<size_t>(weight.columns) * sizeof(Bf16);
}

std::vector<double> turns_of(const RotaryTable& table) {
  std::vector<double> turns;
  turns.reserve(table.inverse_frequencies.size());
  for (const double frequency : table.inverse_frequencies)
    turns.push_back(frequency / (2 * std::numbers::pi));
  return turns;
}

}  // namespace

DeviceWeights::DeviceWeights(const ModelGraph& graph, int device, size_t piece_bytes)
    : graph_(graph), uploader_(std::make_unique<Uploader>(device, piece_bytes)), memory_(0) {
  lay_out();
  memory_ = DeviceBuffer(used_);
  for (size_t i = 0; i < graph_.rotary_tables.size(); ++i) {
    const std::vector<double> turns = turns_of(graph_.rotary_tables[i]);
    uploader_->raw(turns.data(), turns.size() * sizeof(double),
                   at<double>(turns_, static_cast<int32_t>(i)));
  }
}

size_t DeviceWeights::take(size_t bytes) {
  const size_t place = used_;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return place;
}

void DeviceWeights::lay_out() {
  std::map<std::tuple<std::string, int64_t, int64_t>, size_t> known;  // whole weights by their rows
  for (const Weight& weight : graph_.weights.weights()) {
    const WeightPart& part = weight.parts.front();
    const std::tuple key(part.source, part.first_row, part.rows);
    const bool may_share = weight.kind != WeightKind::kVector && weight.parts.size() == 1;
    const auto found = may_share ? known.find(key) : known.end();
    is_shared_.push_back(found != known.end());
    places_.push_back(is_shared_.back() ? found->second : take(bytes_of(weight)));
    if (may_share)
      known.emplace(key, places_.back());
  }
  for (const RotaryTable& table : graph_.rotary_tables)
    turns_.push_back(take(table.inverse_frequencies.size() * sizeof(double)));
}

void DeviceWeights::load(const std::string& source, const float* values, int64_t rows,
                         int64_t columns) {
  if (uploader_ == nullptr)
    throw std::logic_error("load() after finish()");
  graph_.weights.deal(source, values, rows, columns,
                      [this](int32_t weight, int32_t part, const float* part_values) {
                        put(weight, part, part_values);
                      });
  arrived_.insert(source);
}

void DeviceWeights::put(int32_t index, int32_t part, const float* values) {
  if (is_shared_[static_cast<size_t>(index)])
    return;
  const Weight& weight = graph_.weights.weight(index);
  const bool is_paired = weight.order == PartOrder::kPaired;
  int64_t first = is_paired ? part : 0;
  for (int32_t i = 0; !is_paired && i < part; ++i)
    first += weight.parts[static_cast<size_t>(i)].rows;
  const int64_t step = is_paired ? 2 : 1;
  const int64_t rows = weight.parts[static_cast<size_t>(part)].rows;
  if (weight.kind == WeightKind::kVector) {
    put_vector(weight, values, rows, at<float>(places_, index) + first, step);
  } else {
    uploader_->matrix(values, rows, weight.columns,
                      at<Bf16>(places_, index) + first * weight.columns, step * weight.columns);
  }
}

void DeviceWeights::put_vector(const Weight& weight, const float* values, int64_t rows, float* to,
                               int64_t stride) {
  if (weight.offset == 0.0f)
    return uploader_->vector(values, rows, to, stride);
  std::vector<float> shifted(values, values + rows);
  for (float& value : shifted)
    value += weight.offset;
  uploader_->vector(shifted.data(), rows, to, stride);
}

void DeviceWeights::finish() {
  graph_.weights.require_all(arrived_);
  if (uploader_ != nullptr)
    uploader_->finish();
  uploader_.reset();
}

}  // namespace flowprefill
