// attend_by_tiles of csrc/devices/cpu/isa_attention_amx.h on tiles of plain loops: what the manual
// says of tileloadd, tilestored and tdpbf16ps, but for rounding. Compiled for AVX-512 BF16 alone.
#include "plain_tiles.h"

#ifdef FP_ISA_NAMESPACE
#include "devices/cpu/isa_attention_amx.h"

namespace flowprefill {
namespace {

using namespace FP_ISA_NAMESPACE;  // NOLINT

char tiles[8][16][64];

struct PlainTiles {
  static void begin() { std::memset(tiles, 0, sizeof tiles); }
  static void end() { std::memset(tiles, 0xff, sizeof tiles); }
  template <int kTile>
  static void zero() {
    std::memset(tiles[kTile], 0, sizeof tiles[kTile]);
  }
  template <int kTile>
  static void load(const void* from, int64_t row_bytes) {
    for (int r = 0; r < 16; ++r)
      std::memcpy(tiles[kTile][r], static_cast<const char*>(from) + r * row_bytes, 64);
  }
  template <int kTile>
  static void store(void* to, int64_t row_bytes) {
    for (int r = 0; r < 16; ++r)
      std::memcpy(static_cast<char*>(to) + r * row_bytes, tiles[kTile][r], 64);
  }
  template <int kSum, int kA, int kB>
  static void multiply() {
    float sums[16][16];
    Bf16 a[16][32];
    Bf16 b[16][32];
    std::memcpy(sums, tiles[kSum], sizeof sums);
    std::memcpy(a, tiles[kA], sizeof a);
    std::memcpy(b, tiles[kB], sizeof b);
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 16; ++n) {
        for (int k = 0; k < 32; ++k)
          sums[m][n] +=
              FP_ISA_NAMESPACE::load(a[m][k]) * FP_ISA_NAMESPACE::load(b[k / 2][2 * n + k % 2]);
      }
    }
    std::memcpy(tiles[kSum], sums, sizeof sums);
  }
};

}  // namespace

void attend_by_plain_tiles(const AttentionTile& tile) {
  TileAttention<PlainTiles>(tile).run();
}

}  // namespace flowprefill
#else
namespace flowprefill {
void attend_by_plain_tiles(const AttentionTile&) {}
}  // namespace flowprefill
#endif
