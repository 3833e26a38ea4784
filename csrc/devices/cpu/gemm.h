// The matrix kernel of all products and of attention on the CPU, on packed operands: our own for
// float, with AVX-512 BF16 and on AMX tiles; ATen's brgemm (oneDNN's batch-reduce micro-kernel) for
// bytes without AMX, and for bf16 whose sizes ours do not take.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <cstdint>
#include <type_traits>

#include "devices/cpu/row_kernels.h"
#include "graph/model_graph.h"

namespace flowprefill {

// One block product: c[m, n] (+)= a[m, k] * b[k, n]; b packed: float as [k][n], Bf16 as [k /
// 2][n][2].
template <typename T>
struct Block {
  int64_t n, k, lda, ldb, ldc;
  bool add;
};

template <typename T>
Product<T> product_of(const Block<T>& s, int64_t rows, const T* a, const T* b, float* c,
                      const T* ahead = nullptr) {
  return {.rows = rows,
          .n = s.n,
          .k = s.k,
          .lda = s.lda,
          .ldb = s.ldb,
          .ldc = s.ldc,
          .add = s.add,
          .a = a,
          .b = b,
          .c = c,
          .ahead = ahead};
}

inline void brgemm(const Block<float>& s, int64_t m, const float* a, const float* b, float* c) {
  row_kernels<float>().multiply(product_of(s, m, a, b, c));
}

// Whether this processor multiplies packed bf16 natively (AVX-512 BF16 or AMX), and may: see
// isa(). Cost: one probe per process.
bool has_bf16_gemm();
// Whether it multiplies bf16 and bytes by AMX tiles, and may.
bool has_amx();

// Whether the products of a block of `width` columns are made on AMX tiles; its weights are then
// packed as TileProduct wants them. T: Bf16, or uint8_t for bytes; float never.
template <typename T>
bool fits_tiles(int64_t depth, int64_t width) {
  constexpr int64_t kLineBytes = 64;
  return sizeof(T) < sizeof(float) && depth * int64_t{sizeof(T)} % kLineBytes == 0 &&
         width % kTileColumns == 0 && has_amx();
}

inline void brgemm(const Block<Bf16>& s, int64_t m, const Bf16* a, const Bf16* b, float* c) {
  at::native::cpublas::brgemm(m, s.n, s.k, s.lda, s.ldb, s.ldc, s.add,
                              reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, true);
}

// Bytes: a without sign, b with, as [k / 4][n][4]; sums are exact.
inline void brgemm(const Block<uint8_t>& s, int64_t m, const uint8_t* a, const int8_t* b,
                   int32_t* c) {
  at::native::cpublas::brgemm(m, s.n, s.k, s.lda, s.ldb, s.ldc, s.add, a,
                              reinterpret_cast<const signed char*>(b), c, true);
}

// So much of a weight block's depth at once that it stays in a quarter of the smallest L2 (1 MiB)
// while all rows pass over it.
template <typename T>
constexpr int64_t kDepthStep = (int64_t{1} << 18) /
                               (kPartColumns * static_cast<int64_t>(sizeof(T)));

// Ends a series of brgemm calls on this thread (frees the AMX tiles).
template <typename T>
void brgemm_end() {
  if constexpr (sizeof(T) < sizeof(float))
    at::native::cpublas::brgemm_release(true);
}

// Whether it multiplies packed bytes natively (AVX-512 VNNI or AMX), summing all of them exactly,
// and may use AVX-512.
bool has_int8_gemm();

inline bool is_ours(const Block<float>&) {
  return true;
}
// Ours asks for weights ahead, for which ATen's waits.
inline bool is_ours(const Block<Bf16>& s) {
  return s.n % 16 == 0 && row_kernels<Bf16>().multiply != nullptr;
}

// Same as brgemm for any row count. ATen's from at most seven shapes: each is compiled once per
// thread, and a prompt of unseen length must not wait for a compiler. ahead: see Product.
template <typename T, typename Weight, typename Sum>
void brgemm_rows(const Block<T>& shape, int64_t rows, const T* a, const Weight* b, Sum* c,
                 const Weight* ahead = nullptr) {
  if constexpr (std::is_same_v<T, Weight>) {
    if (is_ours(shape))
      return row_kernels<T>().multiply(product_of(shape, rows, a, b, c, ahead));
  }
  for (int64_t done = 0, step = 64; done < rows; done += step) {
    while (step > rows - done)
      step /= 2;
    brgemm(shape, step, a + done * shape.lda, b, c + done * shape.ldc);
  }
  if (has_amx())  // a kernel of ours may have this thread's tiles next, within the same series
    brgemm_end<T>();
}

}  // namespace flowprefill
