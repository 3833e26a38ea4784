// The kernels of csrc/devices/cpu/isa_attention_amx.h and isa_product_amx.h on tiles of plain
// loops: what the manual says of their instructions, but for rounding. Compiled for AVX-512 BF16
// alone.
#include "plain_tiles.h"

#ifdef FP_ISA_NAMESPACE
#include "devices/cpu/isa_attention_amx.h"
#include "devices/cpu/isa_product_amx.h"

namespace flowprefill {
namespace {

using namespace FP_ISA_NAMESPACE;  // NOLINT

char tiles[8][16][64];
TileShapes shapes;

struct PlainTiles {
  static void begin(int rows) {
    std::memset(tiles, 0, sizeof tiles);
    shapes = kTileShapes.of[rows];
  }
  static void end() { std::memset(tiles, 0xff, sizeof tiles); }
  template <int kTile>
  static void zero() {
    std::memset(tiles[kTile], 0, sizeof tiles[kTile]);
  }
  template <int kTile>
  static void load(const void* from, int64_t row_bytes) {
    zero<kTile>();
    for (int r = 0; r < shapes.rows[kTile]; ++r)
      std::memcpy(tiles[kTile][r], static_cast<const char*>(from) + r * row_bytes, 64);
  }
  template <int kTile>
  static void stream(const void* from, int64_t row_bytes) {
    load<kTile>(from, row_bytes);
  }
  template <int kTile>
  static void store(void* to, int64_t row_bytes) {
    for (int r = 0; r < shapes.rows[kTile]; ++r)
      std::memcpy(static_cast<char*>(to) + r * row_bytes, tiles[kTile][r], 64);
  }
  template <int kSum, int kA, int kB, bool kOfBytes = false>
  static void multiply() {
    if constexpr (kOfBytes)
      add_products<int32_t, uint8_t, int8_t>(tiles[kSum], tiles[kA], tiles[kB], shapes.rows[kSum]);
    else
      add_products<float, Bf16, Bf16>(tiles[kSum], tiles[kA], tiles[kB], shapes.rows[kSum]);
  }

 private:
  static float number(Bf16 value) { return FP_ISA_NAMESPACE::load(value); }
  static int32_t number(uint8_t value) { return value; }
  static int32_t number(int8_t value) { return value; }

  template <typename Sum, typename Left, typename Right>
  static void add_products(char (&sum)[16][64], const char (&left)[16][64],
                           const char (&right)[16][64], int rows) {
    constexpr int kPacked = 4 / sizeof(Left);  // one below the other in a column
    Sum sums[16][16];
    Left a[16][64 / sizeof(Left)];
    Right b[16][64 / sizeof(Right)];
    std::memcpy(sums, sum, sizeof sums);
    std::memcpy(a, left, sizeof a);
    std::memcpy(b, right, sizeof b);
    for (int m = 0; m < rows; ++m) {
      for (int n = 0; n < 16; ++n) {
        for (int k = 0; k < 16 * kPacked; ++k)
          sums[m][n] += number(a[m][k]) * number(b[k / kPacked][kPacked * n + k % kPacked]);
      }
    }
    std::memcpy(sum, sums, sizeof sums);
  }
};

}  // namespace

bool can_attend_by_plain_tiles() {
  return row_kernels<Bf16>().attend != nullptr && __builtin_cpu_supports("avx512vbmi");
}
void attend_by_plain_tiles(const AttentionTile& tile) {
  TileAttention<PlainTiles>(tile).run();
}
void multiply_by_plain_tiles(const TileProduct& product) {
  TileMultiplier<PlainTiles, false>(product).run();
}
void multiply_bytes_by_plain_tiles(const TileProduct& product) {
  TileMultiplier<PlainTiles, true>(product).run();
}

}  // namespace flowprefill
#else
namespace flowprefill {
bool can_attend_by_plain_tiles() {
  return false;
}
void attend_by_plain_tiles(const AttentionTile&) {}
void multiply_by_plain_tiles(const TileProduct&) {}
void multiply_bytes_by_plain_tiles(const TileProduct&) {}
}  // namespace flowprefill
#endif
