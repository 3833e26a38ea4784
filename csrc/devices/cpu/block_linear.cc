#include "devices/cpu/block_linear.h"

#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "devices/cpu/buffer.h"
#include "devices/cpu/gemm.h"

namespace flowprefill {
namespace {

constexpr int64_t kStripsPerBlock = kPackColumns / kStripColumns;
static_assert(kStripColumns == kTileColumns);
// Elements of a row of an unpacked tile that belong to one column: bf16 comes in pairs.
template <typename T>
constexpr int64_t kPairs = sizeof(T) == sizeof(Bf16) ? 2 : 1;

}  // namespace

template <typename T>
void BlockLinear<T>::pack(const float*, int64_t, Team&, const std::function<int64_t(int64_t)>&) {
  throw std::logic_error("a matrix of blocks takes no floats");
}

template <typename T>
size_t BlockLinear<T>::prepared_row_bytes(int64_t rows) const {
  return rows <= kDirectRows<T> ? static_cast<size_t>(few_row_bytes(this->depth())) : 0;
}

template <typename T>
void BlockLinear<T>::prepare(int64_t rows, const T* input, void* prepared) const {
  const int64_t depth = this->depth();
  for (int64_t row = 0; row < rows; ++row) {
    row_kernels<T>().prepare_few(input + row * depth, depth,
                                 static_cast<std::byte*>(prepared) + row * few_row_bytes(depth));
  }
}

// The depth in the steps of PackedLinear, whose products have the same bits.
template <typename T>
void BlockLinear<T>::multiply_block(int64_t block, int64_t /*end*/, int64_t rows, const void* input,
                                    float* c, int64_t ldc, bool add) const {
  if (rows <= kDirectRows<T>)
    return multiply_few(block, rows, input, c, ldc, add);
  const T* a = static_cast<const T*>(input);
  const auto& kernels = row_kernels<T>();
  const int64_t depth = this->depth();
  const int64_t width = this->block_columns(block);
  // Not a vector, which may begin within a cache line: then every vector of it lies in two.
  thread_local Buffer buffer(static_cast<size_t>(kDepthStep<T> * kPackColumns) * sizeof(T));
  T* tile = buffer.as<T>();
  const bool is_tiled = fits_tiles<T>(depth, width);
  for (int64_t k = 0; k < depth; k += kDepthStep<T>) {
    const int64_t end = std::min(k + kDepthStep<T>, depth);
    for (int64_t column = 0; column < width; column += kStripColumns) {
      const int64_t strip = block * kStripsPerBlock + column / kStripColumns;
      T* const out = tile + column * (is_tiled ? end - k : kPairs<T>);
      kernels.unpack(matrix_->format(strip), matrix_->strip(strip), k, end, out,
                     is_tiled ? kStripColumns : kPackColumns);
    }
    if (is_tiled) {
      kernels.multiply_by_tiles({.rows = rows,
                                 .columns = width,
                                 .depth_bytes = (end - k) * int64_t{sizeof(T)},
                                 .strip_bytes = (end - k) * kStripColumns * int64_t{sizeof(T)},
                                 .lda = depth * int64_t{sizeof(T)},
                                 .ldc = ldc,
                                 .add = add || k > 0,
                                 .a = a + k,
                                 .b = tile,
                                 .c = c});
      continue;
    }
    const Block<T> shape{.n = width,
                         .k = end - k,
                         .lda = depth,
                         .ldb = kPackColumns,
                         .ldc = ldc,
                         .add = add || k > 0};
    brgemm_rows(shape, rows, a + k, tile, c);
  }
}

template <typename T>
void BlockLinear<T>::multiply_few(int64_t block, int64_t rows, const void* input, float* c,
                                  int64_t ldc, bool add) const {
  const auto& kernels = row_kernels<T>();
  const int64_t depth = this->depth();
  const FewRows few{input, few_row_bytes(depth), static_cast<int>(rows)};
  const int64_t width = this->block_columns(block);
  float product[kDirectRows<T> * kStripColumns];
  for (int64_t column = 0; column < width; column += kStripColumns) {
    const int64_t strip = block * kStripsPerBlock + column / kStripColumns;
    kernels.multiply_few(matrix_->format(strip), matrix_->strip(strip), depth, few, product);
    const int64_t end = std::min<int64_t>(kStripColumns, width - column);
    for (int64_t row = 0; row < rows; ++row) {
      float* out = c + row * ldc + column;
      for (int64_t i = 0; i < end; ++i)
        out[i] = product[row * kStripColumns + i] + (add ? out[i] : 0.0f);
    }
  }
}

template <typename T>
void BlockLinear<T>::end_series() const {
  brgemm_end<T>();
}

template class BlockLinear<float>;
template class BlockLinear<Bf16>;

}  // namespace flowprefill
