#include "devices/cpu/packed_linear.h"

#include <algorithm>
#include <vector>

#include "devices/cpu/gemm.h"

namespace flowprefill {
namespace {

constexpr int64_t kInL2 = int64_t{1} << 20;  // bytes of input that stay there (2 MiB with AMX)
constexpr int64_t kTileRows = 32;
constexpr int64_t kLeastRows = 128;  // for which a block of weights is worth its way

}  // namespace

template <typename T>
PackedLinear<T>::PackedLinear(int64_t depth, int64_t columns)
    : Linear<T>(depth, columns), packed_(static_cast<size_t>(depth * columns) * sizeof(T)) {}

template <typename T>
void PackedLinear<T>::pack(const float* weight, int64_t rows, Team& team,
                           const std::function<int64_t(int64_t)>& place) {
  const auto& kernels = row_kernels<T>();
  const int64_t depth = this->depth();
  team.for_each(rows, [&](int64_t row) {
    thread_local std::vector<T> narrow;
    narrow.resize(static_cast<size_t>(depth));
    kernels.narrow(weight + row * depth, static_cast<int>(depth), narrow.data());
    const int64_t column = place(row);
    const int64_t block = column / kPackColumns;
    const int64_t width = this->block_columns(block);
    T* out = packed_.as<T>() + block * kPackColumns * depth;
    int64_t c = column % kPackColumns;
    int64_t ld = width;
    if (fits_tiles<T>(depth, width)) {
      out += c / kTileColumns * kTileColumns * depth;
      c %= kTileColumns;
      ld = kTileColumns;
    }
    for (int64_t k = 0; k < depth; ++k) {
      const int64_t at = sizeof(T) == sizeof(Bf16) ? (k / 2 * ld + c) * 2 + k % 2 : k * ld + c;
      out[at] = narrow[static_cast<size_t>(k)];
    }
  });
}

template <typename T>
void PackedLinear<T>::multiply_block(int64_t block, int64_t end, int64_t rows, const void* input,
                                     float* c, int64_t ldc, bool add) const {
  const int64_t depth = this->depth();
  const int64_t width = this->block_columns(block);
  const T* a = static_cast<const T*>(input);
  const T* data = packed_.as<T>() + block * kPackColumns * depth;
  if (fits_tiles<T>(depth, width)) {
    return multiply_by_tiles(block, 0, depth, rows, a, c, ldc, add,
                             block + 1 < end ? data + width * depth : nullptr);
  }
  for (int64_t k = 0; k < depth; k += kDepthStep<T>) {
    const Block<T> shape{.n = width,
                         .k = std::min(kDepthStep<T>, depth - k),
                         .lda = depth,
                         .ldb = width,
                         .ldc = ldc,
                         .add = add || k > 0};
    const T* weights = data + k * width;
    const bool has_next = k + shape.k < depth || block + 1 < end;
    brgemm_rows(shape, rows, a + k, weights, c, has_next ? weights + shape.k * width : nullptr);
  }
}

template <typename T>
int64_t PackedLinear<T>::rows_at_once(int64_t rows) const {
  if (!fits_tiles<T>(this->depth(), this->block_columns(0)))
    return rows;
  const int64_t fitting = kInL2 / (this->depth() * int64_t{sizeof(T)});
  return std::min(rows, std::max<int64_t>(kLeastRows, fitting / kTileRows * kTileRows));
}

template <typename T>
void PackedLinear<T>::multiply_by_tiles(int64_t block, int64_t first, int64_t depth, int64_t rows,
                                        const T* a, float* c, int64_t ldc, bool add,
                                        const T* ahead) const {
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  const T* weights = packed_.as<T>() + block * kPackColumns * this->depth() + first * kTileColumns;
  row_kernels<T>().multiply_by_tiles({.rows = rows,
                                      .columns = this->block_columns(block),
                                      .depth_bytes = depth * kBytes,
                                      .strip_bytes = this->depth() * kTileColumns * kBytes,
                                      .lda = this->depth() * kBytes,
                                      .ldc = ldc,
                                      .add = add,
                                      .a = a + first,
                                      .b = weights,
                                      .c = c,
                                      .ahead = ahead});
}

// A deep input that does not stay in L2 is gone through once, a part of its depth after the other,
// instead of once for every block.
template <typename T>
void PackedLinear<T>::multiply_blocks(int64_t begin, int64_t end, int64_t rows, const void* input,
                                      float* c, int64_t ldc, bool add) const {
  const int64_t depth = this->depth();
  const int64_t parts = (rows * depth * int64_t{sizeof(T)} + kInL2 - 1) / kInL2;
  if (parts <= 1 || end - begin <= 1 || !fits_tiles<T>(depth, this->block_columns(end - 1)))
    return Linear<T>::multiply_blocks(begin, end, rows, input, c, ldc, add);
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t lines = depth / kLine;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = lines * part / parts * kLine;
    const int64_t last = lines * (part + 1) / parts * kLine;
    for (int64_t block = begin; block < end; ++block) {
      multiply_by_tiles(block, first, last - first, rows, static_cast<const T*>(input),
                        c + block * kPackColumns, ldc, add || part > 0, nullptr);
    }
  }
}

template <typename T>
void PackedLinear<T>::end_series() const {
  brgemm_end<T>();
}

template class PackedLinear<float>;
template class PackedLinear<Bf16>;

}  // namespace flowprefill
