#include "devices/cpu/cpu_weights.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "devices/cpu/block_linear.h"

namespace flowprefill {
namespace {

// Of parts [begin, end).
int64_t rows_between(const Weight& weight, int32_t begin, int32_t end) {
  int64_t rows = 0;
  for (int32_t i = begin; i < end; ++i)
    rows += weight.parts[static_cast<size_t>(i)].rows;
  return rows;
}

// Where row `row` of a part goes: a column of the packed matrix, an element of the vector.
std::function<int64_t(int64_t)> places(const Weight& weight, int32_t part) {
  if (weight.order == PartOrder::kStacked) {
    const int64_t first = rows_between(weight, 0, part);
    return [first](int64_t row) { return first + row; };
  }
  const int64_t inner = weight.rows() / 2;
  const auto half = static_cast<int32_t>(weight.parts.size() / 2);
  const int64_t first = rows_between(weight, part < half ? 0 : half, part);
  return [inner, first, is_up = part >= half](int64_t part_row) {
    const int64_t row = first + part_row;
    const int64_t run = row / kGateColumns;
    const int64_t width = std::min<int64_t>(kGateColumns, inner - run * kGateColumns);
    return run * kPackColumns + (is_up ? width : 0) + row % kGateColumns;
  };
}

// The format of each strip of 16 columns; none where a part comes otherwise, or a strip would mix.
std::vector<BlockFormat> strip_formats(const Weight& weight, const BlockFormats& formats) {
  const auto count = static_cast<size_t>((weight.rows() + kStripColumns - 1) / kStripColumns);
  std::vector<BlockFormat> strips(count);
  std::vector<bool> is_known(count);
  for (size_t part = 0; part < weight.parts.size(); ++part) {
    const auto found = formats.find(weight.parts[part].source);
    if (found == formats.end())
      return {};
    const auto place = places(weight, static_cast<int32_t>(part));
    for (int64_t row = 0; row < weight.parts[part].rows; ++row) {
      const auto strip = static_cast<size_t>(place(row) / kStripColumns);
      if (is_known[strip] && strips[strip] != found->second)
        return {};
      strips[strip] = found->second;
      is_known[strip] = true;
    }
  }
  return strips;
}

bool are_same_rows(const Weight& a, const Weight& b) {
  return a.parts.size() == 1 && b.parts.size() == 1 && a.columns == b.columns &&
         a.parts[0].source == b.parts[0].source && a.parts[0].rows == b.parts[0].rows &&
         a.parts[0].first_row == b.parts[0].first_row;
}

}  // namespace

template <typename T>
CpuWeights<T>::CpuWeights(std::shared_ptr<const ModelGraph> graph, const MakeLinear<T>& make_linear,
                          int threads, BlockFormats formats)
    : graph_(std::move(graph)),
      formats_(std::move(formats)),
      team_(std::make_unique<Team>(threads)) {
  for (const Weight& weight : graph_->weights.weights()) {
    const auto index = static_cast<int32_t>(storage_.size());
    blocks_.push_back(make_blocks(index));
    switch (weight.kind) {
      case WeightKind::kMatrix:
        storage_.emplace_back(is_in_blocks(index)
                                  ? std::make_unique<BlockLinear<T>>(blocks_.back(), weight.rows())
                                  : make_linear(*graph_, index));
        break;
      case WeightKind::kTable:
        storage_.emplace_back(Buffer(
            is_in_blocks(index) ? 0
                                : sizeof(T) * static_cast<size_t>(weight.rows() * weight.columns)));
        break;
      case WeightKind::kVector:
        storage_.emplace_back(std::vector<float>(static_cast<size_t>(weight.rows())));
        break;
    }
  }
}

template <typename T>
std::shared_ptr<BlockMatrix> CpuWeights<T>::make_blocks(int32_t index) const {
  const Weight& weight = graph_->weights.weight(index);
  if (weight.kind == WeightKind::kVector)
    return nullptr;
  for (size_t other = 0; other < blocks_.size(); ++other) {
    if (blocks_[other] != nullptr &&
        are_same_rows(weight, graph_->weights.weight(static_cast<int32_t>(other))))
      return blocks_[other];
  }
  std::vector<BlockFormat> strips = strip_formats(weight, formats_);
  return strips.empty() ? nullptr
                        : std::make_shared<BlockMatrix>(weight.columns, std::move(strips));
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
void CpuWeights<T>::load_blocks(const std::string& source, const uint8_t* bytes, int64_t rows,
                                int64_t row_bytes) {
  if (team_ == nullptr)
    throw std::logic_error("tensor " + source + ": loaded after finish()");
  const auto found = formats_.find(source);
  if (found == formats_.end())
    throw std::logic_error("tensor " + source + ": came in blocks, which was not announced");
  const BlockLayout& layout = layout_of(found->second);
  if (row_bytes % layout.bytes() != 0) {
    throw std::invalid_argument("tensor " + source + ": got rows of " + std::to_string(row_bytes) +
                                " bytes, expected a multiple of " + std::to_string(layout.bytes()) +
                                " for " + layout.name);
  }
  const int64_t columns = row_bytes / layout.bytes() * layout.depth;
  graph_->weights.each_use(source, rows, columns, [&](int32_t weight, int32_t part) {
    const auto& use = graph_->weights.weight(weight).parts[static_cast<size_t>(part)];
    put_blocks(weight, part, {found->second, bytes + use.first_row * row_bytes});
  });
  arrived_.insert(source);
}

template <typename T>
bool CpuWeights<T>::is_first_of_blocks(int32_t index) const {
  const auto& blocks = blocks_[static_cast<size_t>(index)];
  return std::find(blocks_.begin(), blocks_.end(), blocks) - blocks_.begin() == index;
}

template <typename T>
void CpuWeights<T>::put_blocks(int32_t index, int32_t part, const BlockRows& from) {
  const Weight& weight = graph_->weights.weight(index);
  const int64_t rows = weight.parts[static_cast<size_t>(part)].rows;
  const auto& blocks = blocks_[static_cast<size_t>(index)];
  if (blocks == nullptr) {
    std::vector<float> values(static_cast<size_t>(rows * weight.columns));
    unpack_rows(from, rows, weight.columns, *team_, values.data());
    return put(index, part, values.data());
  }
  if (is_first_of_blocks(index))
    blocks->pack(from, rows, *team_, places(weight, part));
}

template <typename T>
void CpuWeights<T>::look_up(int32_t index, int32_t row, float* out) const {
  const int64_t columns = graph_->weights.weight(index).columns;
  if (!is_in_blocks(index)) {
    const auto& table = std::get<Buffer>(storage_[static_cast<size_t>(index)]);
    row_kernels<T>().widen(table.template as<T>() + row * columns, static_cast<int>(columns), out);
    return;
  }
  thread_local std::vector<T> rounded;
  rounded.resize(static_cast<size_t>(columns));
  blocks_[static_cast<size_t>(index)]->column(row, rounded.data());
  row_kernels<T>().widen(rounded.data(), static_cast<int>(columns), out);
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
  for (size_t i = 0; i < storage_.size(); ++i) {
    const auto& storage = storage_[i];
    if (blocks_[i] != nullptr)
      total += is_first_of_blocks(static_cast<int32_t>(i)) ? blocks_[i]->bytes() : 0;
    else if (const auto* matrix = std::get_if<Matrix>(&storage))
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
