#include "devices/cuda/backend/device_weights.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numbers>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "devices/cuda/backend/plan_shape.h"

namespace flowprefill {
namespace {

constexpr size_t kAlignment = 256;

std::vector<double> turns_of(const RotaryTable& table) {
  std::vector<double> turns;
  turns.reserve(table.inverse_frequencies.size());
  for (const double frequency : table.inverse_frequencies)
    turns.push_back(frequency / (2 * std::numbers::pi));
  return turns;
}

bool may_be_fp8(const Weight& weight) {
  return weight.kind == WeightKind::kMatrix && weight.rows() % 16 == 0 && weight.columns % 16 == 0;
}

// The part's rows of e4m3 as float: each product of code and scale is rounded once.
std::vector<float> dequantised(const uint8_t* bytes, int64_t rows, int64_t columns,
                               int64_t row_bytes) {
  std::vector<float> values;
  values.reserve(static_cast<size_t>(rows * columns));
  for (int64_t row = 0; row < rows; ++row, bytes += row_bytes) {
    float scale = 0;
    std::memcpy(&scale, bytes + columns, sizeof scale);
    for (int64_t i = 0; i < columns; ++i)
      values.push_back(widen(E4m3{bytes[i]}) * scale);
  }
  return values;
}

}  // namespace

std::vector<bool> fp8_weights(const ModelGraph& graph, const CudaBackendOptions& options) {
  const std::set<std::string> known(options.fp8_sources.begin(), options.fp8_sources.end());
  std::vector<bool> is_fp8(graph.weights.weights().size());
  for (const Operator& op : graph.operators) {
    if (op.kind != OperatorKind::kLinear || op.layer < 0)
      continue;
    const Weight& weight = graph.weights.weight(op.weight);
    const bool comes_so = std::ranges::all_of(
        weight.parts, [&known](const WeightPart& part) { return known.contains(part.source); });
    is_fp8[static_cast<size_t>(op.weight)] =
        (options.quantizes_fp8 || comes_so) && may_be_fp8(weight);
  }
  return is_fp8;
}

size_t DeviceWeights::bytes_of(const Weight& weight, bool is_fp8) {
  const auto rows = static_cast<size_t>(padded_to_8(weight.rows()));
  const auto columns = static_cast<size_t>(weight.columns);
  if (weight.kind == WeightKind::kVector)
    return rows * sizeof(float);
  return is_fp8 ? rows * (columns + sizeof(float)) : rows * columns * sizeof(Bf16);
}

DeviceWeights::DeviceWeights(const ModelGraph& graph, int device, size_t piece_bytes,
                             std::vector<bool> is_fp8)
    : graph_(graph),
      uploader_(std::make_unique<Uploader>(device, piece_bytes)),
      memory_(0),
      is_fp8_(std::move(is_fp8)) {
  is_fp8_.resize(graph.weights.weights().size());
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
    const bool is_fp8 = is_fp8_[places_.size()];
    const WeightPart& part = weight.parts.front();
    const std::tuple key(part.source, part.first_row, part.rows);
    const bool may_share =
        weight.kind != WeightKind::kVector && weight.parts.size() == 1 && !is_fp8;
    const auto found = may_share ? known.find(key) : known.end();
    is_shared_.push_back(found != known.end());
    places_.push_back(is_shared_.back() ? found->second : take(bytes_of(weight, is_fp8)));
    // Behind the codes, which are a multiple of 16 bytes.
    scales_.push_back(places_.back() + static_cast<size_t>(weight.rows() * weight.columns));
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

void DeviceWeights::load_blocks(const std::string& source, const uint8_t* bytes, int64_t rows,
                                int64_t row_bytes) {
  if (uploader_ == nullptr)
    throw std::logic_error("load_blocks() after finish()");
  constexpr int64_t kScaleBytes = sizeof(float);
  graph_.weights.each_use(source, rows, row_bytes - kScaleBytes, [&](int32_t weight, int32_t part) {
    const WeightPart& of = graph_.weights.weight(weight).parts[static_cast<size_t>(part)];
    put_blocks(weight, part, bytes + of.first_row * row_bytes, row_bytes);
  });
  arrived_.insert(source);
}

DeviceWeights::PartRows DeviceWeights::rows_of(const Weight& weight, int32_t part) const {
  if (weight.order == PartOrder::kPaired)
    return {.first = part, .step = 2};
  int64_t first = 0;
  for (int32_t i = 0; i < part; ++i)
    first += weight.parts[static_cast<size_t>(i)].rows;
  return {.first = first, .step = 1};
}

void DeviceWeights::put(int32_t index, int32_t part, const float* values) {
  if (is_shared_[static_cast<size_t>(index)])
    return;
  const Weight& weight = graph_.weights.weight(index);
  const auto [first, step] = rows_of(weight, part);
  const int64_t rows = weight.parts[static_cast<size_t>(part)].rows;
  const int64_t place = first * weight.columns;
  const int64_t stride = step * weight.columns;
  if (weight.kind == WeightKind::kVector) {
    put_vector(weight, values, rows, at<float>(places_, index) + first, step);
  } else if (is_fp8(index)) {
    const std::vector<float> scales = uploader_->quantised(
        values, rows, weight.columns, at<E4m3>(places_, index) + place, stride);
    uploader_->vector(scales.data(), rows, at<float>(scales_, index) + first, step);
  } else {
    uploader_->matrix(values, rows, weight.columns, at<Bf16>(places_, index) + place, stride);
  }
}

void DeviceWeights::put_blocks(int32_t index, int32_t part, const uint8_t* bytes,
                               int64_t row_bytes) {
  const Weight& weight = graph_.weights.weight(index);
  const int64_t rows = weight.parts[static_cast<size_t>(part)].rows;
  if (!is_fp8(index))
    return put(index, part, dequantised(bytes, rows, weight.columns, row_bytes).data());
  const auto [first, step] = rows_of(weight, part);
  uploader_->codes(bytes, row_bytes, rows, weight.columns,
                   at<E4m3>(places_, index) + first * weight.columns, step * weight.columns);
  std::vector<float> scales(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row)
    std::memcpy(&scales[static_cast<size_t>(row)], bytes + row * row_bytes + weight.columns,
                sizeof(float));
  uploader_->vector(scales.data(), rows, at<float>(scales_, index) + first, step);
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
