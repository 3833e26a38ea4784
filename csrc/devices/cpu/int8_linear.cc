#include "devices/cpu/int8_linear.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "devices/cpu/gemm.h"

namespace flowprefill {
namespace {

constexpr int64_t kMaxDepth = int64_t{1} << 16;  // 2^16 * 255 * 127 < 2^31
constexpr int64_t kRows = 64;                    // whose sums stay in L1
constexpr int64_t kTileRows = 256;               // on AMX tiles, which read weights once for them
constexpr float kLargest = 127.0f;
constexpr float kSmallest = 1e-30f;  // rows of nothing larger become zero

float scale_of(float largest) {
  return largest < kSmallest ? 0.0f : largest / kLargest;  // NaN stays
}
float inverse_of(float largest) {
  return largest < kSmallest ? 0.0f : kLargest / largest;
}

}  // namespace

template <typename T>
Int8Linear<T>::Int8Linear(int64_t depth, int64_t columns)
    : Linear<T>(depth, columns),
      padded_depth_((depth + kRotatedRun - 1) / kRotatedRun * kRotatedRun),
      packed_(static_cast<size_t>(padded_depth_ * columns)),
      scales_(static_cast<size_t>(columns)),
      shifts_(static_cast<size_t>(columns)) {
  if (padded_depth_ > kMaxDepth)
    throw std::invalid_argument("quantization: int8 takes at most " + std::to_string(kMaxDepth) +
                                " input columns of a product, got " + std::to_string(depth));
}

template <typename T>
size_t Int8Linear<T>::bytes() const {
  return packed_.bytes() + scales_.size() * sizeof(float) + shifts_.size() * sizeof(int32_t);
}

template <typename T>
void Int8Linear<T>::pack(const float* weight, int64_t rows, Team& team,
                         const std::function<int64_t(int64_t)>& place) {
  const auto& kernels = row_kernels<float>();
  team.for_each(rows, [&](int64_t row) {
    thread_local std::vector<float> rotated;
    thread_local std::vector<uint8_t> bytes;
    rotated.resize(static_cast<size_t>(padded_depth_));
    bytes.resize(static_cast<size_t>(padded_depth_));
    const float largest = kernels.rotate(weight + row * this->depth(),
                                         static_cast<int>(this->depth()), rotated.data());
    kernels.round_to_bytes(rotated.data(), static_cast<int>(padded_depth_), inverse_of(largest),
                           bytes.data());
    const int64_t column = place(row);
    const int64_t block = column / kPackColumns;
    const int64_t width = this->block_columns(block);
    int64_t c = column % kPackColumns;
    auto* out = packed_.as<int8_t>() + block * kPackColumns * padded_depth_;
    int64_t ld = width;
    if (fits_tiles<uint8_t>(padded_depth_, width)) {
      out += c / kTileColumns * kTileColumns * padded_depth_;
      c %= kTileColumns;
      ld = kTileColumns;
    }
    int32_t sum = 0;
    for (int64_t k = 0; k < padded_depth_; ++k) {
      const int value = bytes[static_cast<size_t>(k)] - kByteZero;
      out[(k / 4 * ld + c) * 4 + k % 4] = static_cast<int8_t>(value);
      sum += value;
    }
    scales_[static_cast<size_t>(column)] = scale_of(largest);
    shifts_[static_cast<size_t>(column)] = sum * kByteZero;
  });
}

// A row's bytes, then its scale, in whole cache lines.
template <typename T>
size_t Int8Linear<T>::prepared_row_bytes(int64_t) const {
  return static_cast<size_t>(padded_depth_ + kRotatedRun);
}

template <typename T>
void Int8Linear<T>::prepare(int64_t rows, const T* input, void* prepared) const {
  thread_local std::vector<float> rotated;
  rotated.resize(static_cast<size_t>(padded_depth_));
  const auto& kernels = row_kernels<T>();
  auto* out = static_cast<uint8_t*>(prepared);
  for (int64_t r = 0; r < rows; ++r, out += prepared_row_bytes(rows)) {
    const float largest =
        kernels.rotate(input + r * this->depth(), static_cast<int>(this->depth()), rotated.data());
    kernels.round_to_bytes(rotated.data(), static_cast<int>(padded_depth_), inverse_of(largest),
                           out);
    *reinterpret_cast<float*>(out + padded_depth_) = scale_of(largest);
  }
}

template <typename T>
void Int8Linear<T>::multiply_block(int64_t block, int64_t end, int64_t rows, const void* input,
                                   float* c, int64_t ldc, bool add) const {
  thread_local std::vector<int32_t> memory;
  int32_t* const sums = line_of(memory, kTileRows * kPackColumns);
  const int64_t width = this->block_columns(block);
  const bool is_tiled = fits_tiles<uint8_t>(padded_depth_, width);
  const int64_t step = is_tiled ? kTileRows : kRows;
  const auto stride = static_cast<int64_t>(prepared_row_bytes(rows));
  const auto* a = static_cast<const uint8_t*>(input);
  const auto first = static_cast<size_t>(block * kPackColumns);
  for (int64_t done = 0; done < rows; done += step) {
    const int64_t count = std::min(step, rows - done);
    const uint8_t* mine = a + done * stride;
    const bool is_next_block = done + step >= rows && block + 1 < end;
    if (is_tiled)
      multiply_by_tiles(block, is_next_block, count, mine, stride, sums);
    else
      multiply_rows(block, count, mine, stride, sums);
    row_kernels<T>().scale_product({.product = sums,
                                    .columns = static_cast<int>(width),
                                    .column_scales = scales_.data() + first,
                                    .column_shifts = shifts_.data() + first,
                                    .row_scales = mine + padded_depth_,
                                    .row_stride = stride},
                                   static_cast<int>(count), c + done * ldc, ldc, add);
  }
}

template <typename T>
void Int8Linear<T>::multiply_by_tiles(int64_t block, bool asks_for_next, int64_t rows,
                                      const uint8_t* a, int64_t stride, int32_t* sums) const {
  const int64_t width = this->block_columns(block);
  const auto* weights = packed_.as<int8_t>() + block * kPackColumns * padded_depth_;
  row_kernels<T>().multiply_bytes_by_tiles(
      {.rows = rows,
       .columns = width,
       .depth_bytes = padded_depth_,
       .strip_bytes = padded_depth_ * kTileColumns,
       .lda = stride,
       .ldc = width,
       .add = false,
       .a = a,
       .b = weights,
       .c = sums,
       .ahead = asks_for_next ? weights + width * padded_depth_ : nullptr});
}

template <typename T>
void Int8Linear<T>::multiply_rows(int64_t block, int64_t rows, const uint8_t* a, int64_t stride,
                                  int32_t* sums) const {
  const int64_t width = this->block_columns(block);
  const auto* weights = packed_.as<int8_t>() + block * kPackColumns * padded_depth_;
  for (int64_t k = 0; k < padded_depth_; k += kDepthStep<uint8_t>) {
    const Block<uint8_t> shape{.n = width,
                               .k = std::min(kDepthStep<uint8_t>, padded_depth_ - k),
                               .lda = stride,
                               .ldb = width,
                               .ldc = width,
                               .add = k > 0};
    brgemm_rows(shape, rows, a + k, weights + k * width, sums);
  }
}

template <typename T>
void Int8Linear<T>::end_series() const {
  brgemm_end<uint8_t>();
}

template class Int8Linear<float>;
template class Int8Linear<Bf16>;

}  // namespace flowprefill
