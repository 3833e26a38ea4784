#include "devices/cpu/packed_linear.h"

#include <algorithm>
#include <vector>

#include "devices/cpu/gemm.h"

namespace flowprefill {
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
    const int64_t row_bytes = depth * int64_t{sizeof(T)};
    return row_kernels<T>().multiply_by_tiles(
        {.rows = rows,
         .columns = width,
         .depth_bytes = row_bytes,
         .lda = row_bytes,
         .ldc = ldc,
         .add = add,
         .a = a,
         .b = data,
         .c = c,
         .ahead = block + 1 < end ? data + width * depth : nullptr});
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
void PackedLinear<T>::end_series() const {
  brgemm_end<T>();
}

template class PackedLinear<float>;
template class PackedLinear<Bf16>;

}  // namespace flowprefill
