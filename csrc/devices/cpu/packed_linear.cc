#include "devices/cpu/packed_linear.h"

#include <algorithm>
#include <vector>

namespace flowprefill {
namespace {

// So much of a block's depth at once that it stays in a quarter of the smallest L2 (1 MiB) while
// all rows pass over it.
template <typename T>
constexpr int64_t kDepthStep = (int64_t{1} << 18) /
                               (kPackColumns * static_cast<int64_t>(sizeof(T)));

}  // namespace

template <typename T>
PackedLinear<T>::PackedLinear(int64_t depth, int64_t columns)
    : depth_(depth), columns_(columns), packed_(static_cast<size_t>(depth * columns) * sizeof(T)) {}

template <typename T>
int64_t PackedLinear<T>::block_columns(int64_t block) const {
  return std::min<int64_t>(kPackColumns, columns_ - block * kPackColumns);
}

template <typename T>
const T* PackedLinear<T>::block_data(int64_t block) const {
  return packed_.as<T>() + block * kPackColumns * depth_;
}

template <typename T>
void PackedLinear<T>::pack(const float* weight, int64_t rows, Team& team,
                           const std::function<int64_t(int64_t)>& place) {
  const auto& kernels = row_kernels<T>();
  team.for_each(rows, [&](int64_t row) {
    thread_local std::vector<T> narrow;
    narrow.resize(static_cast<size_t>(depth_));
    kernels.narrow(weight + row * depth_, static_cast<int>(depth_), narrow.data());
    const int64_t column = place(row);
    const int64_t block = column / kPackColumns;
    const int64_t width = block_columns(block);
    T* out = packed_.as<T>() + block * kPackColumns * depth_;
    const int64_t c = column % kPackColumns;
    for (int64_t k = 0; k < depth_; ++k) {
      const int64_t at =
          sizeof(T) == sizeof(Bf16) ? (k / 2 * width + c) * 2 + k % 2 : k * width + c;
      out[at] = narrow[static_cast<size_t>(k)];
    }
  });
}

template <typename T>
void PackedLinear<T>::multiply_block(int64_t block, int64_t rows, const T* a, int64_t lda, float* c,
                                     int64_t ldc, bool add) const {
  const int64_t width = block_columns(block);
  for (int64_t k = 0; k < depth_; k += kDepthStep<T>) {
    const Block<T> shape{.n = width,
                         .k = std::min(kDepthStep<T>, depth_ - k),
                         .lda = lda,
                         .ldb = width,
                         .ldc = ldc,
                         .add = add || k > 0};
    brgemm_rows(shape, rows, a + k, block_data(block) + k * width, c);
  }
}

template <typename T>
void PackedLinear<T>::multiply(int64_t begin, int64_t end, int64_t rows, const T* a, int64_t lda,
                               float* c, int64_t ldc, bool add) const {
  for (int64_t block = begin; block < end; ++block) {
    multiply_block(block, rows, a, lda, c + block * kPackColumns, ldc, add);
  }
  brgemm_end<T>();
}

template class PackedLinear<float>;
template class PackedLinear<Bf16>;

}  // namespace flowprefill
