// AMX tiles: the processor's instructions on them, and which tile holds what. Included by
// isa_attention_amx.h and isa_product_amx.h, whose kernels take the tiles as a type:
// row_kernels.isa.cc gives them the processor's, a test plain loops.
#pragma once

#include <cstdint>

#include "devices/cpu/tile_shapes.h"

#if defined(__AVX512BF16__) && defined(__x86_64__)
namespace flowprefill {
namespace FP_ISA_NAMESPACE {
namespace {

constexpr int kSquare = 16;         // rows of a tile, and columns of sums
constexpr int kPair = 2 * kSquare;  // rows or columns of two tiles
constexpr int64_t kTileBytes = 64;  // of a row of a tile

// Of the eight tiles 0 to 3 are sums: 0 and 1 of upper rows, 2 and 3 of up to sixteen rows below
// them. 4 and 5 are these rows of the left operand, 6 and 7 two sixteens of columns of the right
// one.
//
// Assembler instead of the compiler's functions: these want the tiles' numbers in their source.
struct ProcessorTiles {
  // Tiles of the upper rows have at most 16 of so many rows, those below them the rest.
  static void begin(int rows) { asm volatile("ldtilecfg %0" ::"m"(kTileShapes.of[rows])); }
  static void end() { asm volatile("tilerelease"); }
  template <int kTile>
  static inline __attribute__((always_inline)) void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static inline __attribute__((always_inline)) void load(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(kTile)
                 : "memory");
  }
  // What is soon read again from L2 at most: it leaves L1 to others.
  template <int kTile>
  static inline __attribute__((always_inline)) void stream(const void* from, int64_t row_bytes) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  static inline __attribute__((always_inline)) void store(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(kTile) : "memory");
  }
  // Sum += A * B: of bf16, or of bytes, those of A without sign and those of B with one.
  template <int kSum, int kA, int kB, bool kOfBytes = false>
  static inline __attribute__((always_inline)) void multiply() {
    if constexpr (kOfBytes)  // NOLINT(bugprone-branch-clone): they differ in their instruction
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
    else
      asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
  }
};

// Up to 32 by 32 sums, on tiles 0 to 3: lower rows and right columns only if there are some.
template <typename Tiles, bool kHasLower, bool kHasRight>
struct TileSums {
  static inline __attribute__((always_inline)) void clear() {
    Tiles::template zero<0>();
    if constexpr (kHasRight)
      Tiles::template zero<1>();
    if constexpr (kHasLower)
      Tiles::template zero<2>();
    if constexpr (kHasLower && kHasRight)
      Tiles::template zero<3>();
  }
  static inline __attribute__((always_inline)) void load(const void* c, int64_t row_bytes) {
    const char* const upper = static_cast<const char*>(c);
    const char* const lower = upper + kSquare * row_bytes;
    Tiles::template load<0>(upper, row_bytes);
    if constexpr (kHasRight)
      Tiles::template load<1>(upper + kTileBytes, row_bytes);
    if constexpr (kHasLower)
      Tiles::template load<2>(lower, row_bytes);
    if constexpr (kHasLower && kHasRight)
      Tiles::template load<3>(lower + kTileBytes, row_bytes);
  }
  static inline __attribute__((always_inline)) void store(void* c, int64_t row_bytes) {
    char* const upper = static_cast<char*>(c);
    char* const lower = upper + kSquare * row_bytes;
    Tiles::template store<0>(upper, row_bytes);
    if constexpr (kHasRight)
      Tiles::template store<1>(upper + kTileBytes, row_bytes);
    if constexpr (kHasLower)
      Tiles::template store<2>(lower, row_bytes);
    if constexpr (kHasLower && kHasRight)
      Tiles::template store<3>(lower + kTileBytes, row_bytes);
  }
  // Adds the products of the operands on tiles 4 to 7.
  template <bool kOfBytes = false>
  static inline __attribute__((always_inline)) void add() {
    Tiles::template multiply<0, 4, 6, kOfBytes>();
    if constexpr (kHasLower)
      Tiles::template multiply<2, 5, 6, kOfBytes>();
    if constexpr (kHasRight)
      Tiles::template multiply<1, 4, 7, kOfBytes>();
    if constexpr (kHasLower && kHasRight)
      Tiles::template multiply<3, 5, 7, kOfBytes>();
  }
};

}  // namespace
}  // namespace FP_ISA_NAMESPACE
}  // namespace flowprefill
#endif
