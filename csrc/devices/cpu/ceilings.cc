#include "devices/cpu/ceilings.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <functional>

#include "devices/cpu/buffer.h"
#include "devices/cpu/gemm.h"
#include "devices/cpu/isa.h"
#include "devices/cpu/linear.h"
#include "devices/cpu/team.h"
#include "devices/cpu/tile_shapes.h"

#if FP_ISA_LEVELS > 1
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12, in its own header (bug 105593)
#endif
#include <immintrin.h>
#endif

namespace flowprefill {
namespace {

constexpr int kTries = 5;
constexpr int64_t kRows = 48;   // of a product in L1: whole tiles of every kernel
constexpr int64_t kDepth = 64;  // 16 KiB of weights in float
constexpr int64_t kProducts = 2000;
constexpr int64_t kReadOnce = int64_t{32} << 20;  // bytes that a thread reads in a try, at least
constexpr int64_t kMemory = int64_t{256} << 20;

double seconds_of(const std::function<void()>& body) {
  const auto start = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Work done per second by all threads, the best try; body does so much of it for one thread.
template <typename Body>
double best_rate(Team& team, double work, const Body& body) {
  double best = 0.0;
  for (int i = 0; i < kTries; ++i) {
    const double took = seconds_of([&] { team.for_each(team.threads(), body); });
    best = std::max(best, work * team.threads() / took);
  }
  return best;
}

// Of products in float whose operands stay in L1, where no instruction set is known.
double product_rate(Team& team) {
  const Buffer a(sizeof(float) * kRows * kDepth);
  const Buffer b(sizeof(float) * kDepth * kPackColumns);
  const Block<float> shape{.n = kPackColumns,
                           .k = kDepth,
                           .lda = kDepth,
                           .ldb = kPackColumns,
                           .ldc = kPackColumns,
                           .add = false};
  const double operations = 2.0 * kRows * kDepth * kPackColumns * kProducts;
  return best_rate(team, operations, [&](int64_t) {
    thread_local std::vector<float> c(kRows * kPackColumns);
    for (int64_t i = 0; i < kProducts; ++i)
      brgemm(shape, kRows, a.as<float>(), b.as<float>(), c.data());
    brgemm_end<float>();
  });
}

#if FP_ISA_LEVELS > 1
constexpr int64_t kSteps = 200'000;
constexpr int kSums = 12;  // at least the latency of two units, and AVX2 has registers for them

// Operands and sums stay in registers: nothing takes time but the instruction.
#define FP_IN_REGISTERS(name, features, Sum, zero, one, multiply_add)             \
  __attribute__((target(features))) void name() {                                 \
    Sum sums[kSums];                                                              \
    _Pragma("GCC unroll 12") for (int s = 0; s < kSums; ++s) sums[s] = zero;      \
    const auto ones = one;                                                        \
    for (int64_t i = 0; i < kSteps; ++i) {                                        \
      _Pragma("GCC unroll 12") for (int s = 0; s < kSums; ++s) {                  \
        sums[s] = multiply_add;                                                   \
        asm volatile("" : "+v"(sums[s])); /* must not be worked out beforehand */ \
      }                                                                           \
    }                                                                             \
  }

FP_IN_REGISTERS(multiply_avx2, "avx2,fma", __m256, _mm256_setzero_ps(), _mm256_set1_ps(1.0f),
                _mm256_fmadd_ps(ones, ones, sums[s]))
FP_IN_REGISTERS(multiply_avx512, "avx512f", __m512, _mm512_setzero_ps(), _mm512_set1_ps(1.0f),
                _mm512_fmadd_ps(ones, ones, sums[s]))
FP_IN_REGISTERS(multiply_bf16, "avx512f,avx512bf16", __m512, _mm512_setzero_ps(),
                _mm512_cvtne2ps_pbh(_mm512_set1_ps(1.0f), _mm512_set1_ps(1.0f)),
                _mm512_dpbf16_ps(sums[s], ones, ones))
FP_IN_REGISTERS(multiply_int8, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(),
                _mm512_set1_epi8(1), _mm512_dpbusd_epi32(sums[s], ones, ones))
#undef FP_IN_REGISTERS

// Operations per second of such a loop; lanes: products of one instruction.
double register_rate(Team& team, int lanes, void (*loop)()) {
  return best_rate(team, 2.0 * lanes * kSums * kSteps, [loop](int64_t) { loop(); });
}

constexpr int kTileSums = 6;  // more than the latency; the other two tiles are what is multiplied

#define FP_TILES(instruction) \
  instruction(2, 0, 1);       \
  instruction(3, 0, 1);       \
  instruction(4, 0, 1);       \
  instruction(5, 0, 1);       \
  instruction(6, 0, 1);       \
  instruction(7, 0, 1)

// Of zeros: only after isa() has said kAmx.
__attribute__((target("amx-tile,amx-bf16,amx-int8"))) void multiply_tiles(bool of_bytes) {
  // Not of a copy on the stack: GCC says that this reads 8 bytes, so the rest might never be
  // written.
  _tile_loadconfig(&kTileShapes.of[kMostTileRows]);
  for (int64_t i = 0; i < kSteps; ++i) {
    if (of_bytes) {
      FP_TILES(_tile_dpbusd);
    } else {
      FP_TILES(_tile_dpbf16ps);
    }
  }
  _tile_release();
}
#undef FP_TILES

// Operations per second of AMX: a call of a product in L1 takes as long as its instructions.
double tile_rate(Team& team, bool of_bytes) {
  const double operations = 2.0 * 16 * 16 * (of_bytes ? 64 : 32) * kTileSums * kSteps;
  return best_rate(team, operations, [of_bytes](int64_t) { multiply_tiles(of_bytes); });
}
#endif

double f32_rate(Team& team) {
#if FP_ISA_LEVELS > 1
  if (isa() >= Isa::kAvx512)
    return register_rate(team, 16, multiply_avx512);
  if (isa() == Isa::kAvx2)
    return register_rate(team, 8, multiply_avx2);
#endif
  return product_rate(team);
}

double bf16_rate(Team& team) {
  if (!has_bf16_gemm())
    return 0.0;
#if FP_ISA_LEVELS > 1
  return isa() == Isa::kAmx ? tile_rate(team, false) : register_rate(team, 32, multiply_bf16);
#else
  static_cast<void>(team);
  return 0.0;
#endif
}

double int8_rate(Team& team) {
#if FP_ISA_LEVELS > 1
  if (isa() == Isa::kAmx && __builtin_cpu_supports("amx-int8"))
    return tile_rate(team, true);
  if (isa() >= Isa::kAvx512 && __builtin_cpu_supports("avx512vnni"))
    return register_rate(team, 64, multiply_int8);
#endif
  static_cast<void>(team);
  return 0.0;
}

// Each thread reads a part of its own, as often as it takes to read enough.
double read_rate(Team& team, const Buffer& memory, int64_t bytes) {
  constexpr int64_t kRowBytes = sizeof(float) * kPackColumns;
  const int64_t depth = bytes / team.threads() / kRowBytes;
  const int64_t passes = std::max<int64_t>(1, kReadOnce / (depth * kRowBytes));
  const std::vector<float> ones(static_cast<size_t>(depth), 1.0f);
  const double read = static_cast<double>(passes * depth * kRowBytes);
  return best_rate(team, read, [&](int64_t part) {
    float c[kPackColumns];
    for (int64_t pass = 0; pass < passes; ++pass) {
      row_kernels<float>().multiply({.rows = 1,
                                     .n = kPackColumns,
                                     .k = depth,
                                     .lda = depth,
                                     .ldb = kPackColumns,
                                     .ldc = kPackColumns,
                                     .add = false,
                                     .a = ones.data(),
                                     .b = memory.as<float>() + part * depth * kPackColumns,
                                     .c = c});
    }
  });
}

int64_t l2_bytes() {
  const long found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  return found > 0 ? found : int64_t{1} << 20;
}

}  // namespace

Ceilings measure_ceilings(int threads) {
  Team team(threads);
  Ceilings found{
      .f32 = f32_rate(team), .bf16 = bf16_rate(team), .int8 = int8_rate(team), .reads = {}};
  Buffer memory(kMemory);
  std::fill_n(memory.as<float>(), kMemory / sizeof(float), 1.0f);
  for (const int64_t bytes : {l2_bytes() / 2 * threads, l2_bytes() * 4 * threads, kMemory})
    found.reads.push_back({bytes, read_rate(team, memory, std::min(bytes, kMemory))});
  return found;
}

}  // namespace flowprefill
