// The fused SwiGLU epilogue: store_gated() by itself, and the whole epilogue of the CUTLASS kernels
// on the host: CUTLASS's exchange through shared memory, its coordinates, our callbacks.
#include "cutlass_on_host.h"  // first

#include <cutlass/gemm/kernel/default_gemm_universal_with_visitor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cuda/kernels/gemm_gated_tiles.h"

namespace flowprefill {
namespace {

constexpr Bf16 kUntouched = 0x7fc1;  // a NaN that no rounding gives

double wanted(double gate, double up) {
  return gate / (1.0 + std::exp(-gate)) * up;
}

void expect_rounded(Bf16 got, double want, const char* what, int row, int column) {
  ASSERT_LE(std::abs(widen(got) - want), std::abs(want) / 256 + 1e-30)
      << what << " at row " << row << ", column " << column;
}

TEST(StoreGated, AddsTheBiasBeforeTheActivationAndRoundsOnce) {
  const float accumulators[8] = {1.5f, -2.0f, -3.0f, 0.25f, 100.0f, 1e-3f, -100.0f, 5.0f};
  const std::vector<float> bias = {9, 9, 9, 9, 9, 9, 9, 9, 0.5f, 1.0f, -1.0f, 2.0f, 0, 1, 2, -3};
  for (const float* of_bias : {static_cast<const float*>(nullptr), bias.data()}) {
    alignas(16) Bf16 d[3 * 16];
    std::fill(std::begin(d), std::end(d), kUntouched);
    const GatedOutput out{d, 16, of_bias, 3, 16};
    store_gated(out, 1, 8, accumulators);
    for (int i = 0; i < 3 * 16; ++i) {
      if (i < 16 + 4 || i >= 16 + 8) {
        ASSERT_EQ(d[i], kUntouched) << i;
        continue;
      }
      const int at = 2 * (i - 16 - 4);
      const double gate = accumulators[at] + (of_bias ? of_bias[8 + at] : 0.0f);
      const double up = accumulators[at + 1] + (of_bias ? of_bias[8 + at + 1] : 0.0f);
      expect_rounded(d[i], wanted(gate, up), "store_gated", 1, i - 16);
    }
  }
}

TEST(StoreGated, TouchesNothingBeyondRowsAndColumns) {
  const float accumulators[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  alignas(16) Bf16 d[32];
  std::fill(std::begin(d), std::end(d), kUntouched);
  const GatedOutput out{d, 8, nullptr, 2, 16};
  store_gated(out, 2, 0, accumulators);
  store_gated(out, 0, 16, accumulators);
  for (const Bf16 value : d)
    ASSERT_EQ(value, kUntouched);
}

// The accumulators of one block of threads, as the warps' matrix products leave them: 16 x 8 pieces
// down then across, of each rows lane / 4 and 8 more, columns 2 * (lane % 4) and the next.
template <class Tile>
typename Tile::Kernel::Epilogue::AccumulatorTile accumulators_of(const simt::Thread& t,
                                                                 const std::vector<float>& tile) {
  using Block = typename Tile::Block;
  using Warp = typename Tile::Warp;
  constexpr int kWarpsDown = Block::kM / Warp::kM;
  const int first_row = t.warp() % kWarpsDown * Warp::kM;
  const int first_column = t.warp() / kWarpsDown * Warp::kN;
  typename Tile::Kernel::Epilogue::AccumulatorTile out;
  int next = 0;
  for (int column = 0; column < Warp::kN; column += 8) {
    for (int row = 0; row < Warp::kM; row += 16) {
      for (int i = 0; i < 4; ++i) {
        const int m = first_row + row + t.lane() / 4 + i / 2 * 8;
        const int n = first_column + column + t.lane() % 4 * 2 + i % 2;
        out[next++] = tile[static_cast<size_t>(m * Block::kN + n)];
      }
    }
  }
  return out;
}

// A product of 1.5 x 1.25 tiles: the last blocks are cut off in both directions.
template <class Tile>
void test_epilogue(uint32_t seed, bool has_bias) {
  using Block = typename Tile::Block;
  using Epilogue = typename Tile::Kernel::Epilogue;
  const int rows = Block::kM + Block::kM / 2 - 3;
  const int columns = Block::kN + Block::kN / 4;
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> product(static_cast<size_t>(4 * Block::kM * Block::kN));
  for (float& value : product)
    value = normal(engine);
  std::vector<float> bias(static_cast<size_t>(columns));
  for (float& value : bias)
    value = normal(engine);
  const int ldd = columns / 2 + 8;
  std::vector<Bf16> d(static_cast<size_t>((rows + 1) * ldd), kUntouched);
  const GatedOutput out{d.data(), ldd, has_bias ? bias.data() : nullptr, rows, columns};
  const auto tile_of = [&](int block) {
    const size_t size = static_cast<size_t>(Block::kM) * Block::kN;
    return std::vector<float>(product.begin() + static_cast<ptrdiff_t>(size) * block,
                              product.begin() + static_cast<ptrdiff_t>(size) * (block + 1));
  };
  for (int block = 0; block < 4; ++block) {
    const std::vector<float> tile = tile_of(block);
    simt::launch({.threads = Tile::Kernel::kThreadCount,
                  .shared_bytes = sizeof(typename Epilogue::SharedStorage),
                  .seed = seed + static_cast<uint32_t>(block)},
                 [&](const simt::Thread& t) {
                   simt::current = &t;
                   Epilogue epilogue(out, *t.shared<typename Epilogue::SharedStorage>(), t.index(),
                                     t.warp(), t.lane());
                   epilogue(accumulators_of<Tile>(t, tile), {block / 2, block % 2, 0},
                            cute::make_shape(rows, columns, 1), t.index());
                 });
  }
  const auto product_at = [&](int row, int column) {
    const int block = row / Block::kM * 2 + column / Block::kN;
    const size_t inside = static_cast<size_t>(row % Block::kM * Block::kN + column % Block::kN);
    return product[static_cast<size_t>(block * Block::kM * Block::kN) + inside] +
           (has_bias ? bias[static_cast<size_t>(column)] : 0.0f);
  };
  for (int row = 0; row < rows + 1; ++row) {
    for (int column = 0; column < ldd; ++column) {
      const Bf16 got = d[static_cast<size_t>(row * ldd + column)];
      if (row >= rows || column >= columns / 2) {
        ASSERT_EQ(got, kUntouched) << "row " << row << ", column " << column;
      } else {
        expect_rounded(got, wanted(product_at(row, 2 * column), product_at(row, 2 * column + 1)),
                       "epilogue", row, column);
      }
    }
  }
}

TEST(GatedEpilogue, Of64x64StoresEachResultOnceAtItsPlace) {
  test_epilogue<Gated64x64>(1, false);
  test_epilogue<Gated64x64>(2, true);
}
TEST(GatedEpilogue, Of128x128StoresEachResultOnceAtItsPlace) {
  test_epilogue<Gated128x128>(3, false);
  test_epilogue<Gated128x128>(4, true);
}
TEST(GatedEpilogue, Of256x128StoresEachResultOnceAtItsPlace) {
  test_epilogue<Gated256x128>(5, false);
  test_epilogue<Gated256x128>(6, true);
}

}  // namespace
}  // namespace flowprefill
