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

template <typename T>
double product_rate(Team& team) {
  const Buffer a(sizeof(T) * kRows * kDepth);
  const Buffer b(sizeof(T) * kDepth * kPackColumns);
  const Block<T> shape{.n = kPackColumns,
                       .k = kDepth,
                       .lda = kDepth,
                       .ldb = kPackColumns,
                       .ldc = kPackColumns,
                       .add = false};
  const double operations = 2.0 * kRows * kDepth * kPackColumns * kProducts;
  return best_rate(team, operations, [&](int64_t) {
    thread_local std::vector<float> c(kRows * kPackColumns);
    for (int64_t i = 0; i < kProducts; ++i)
      brgemm(shape, kRows, a.as<T>(), b.as<T>(), c.data());
    brgemm_end<T>();
  });
}

#if FP_ISA_LEVELS > 1
constexpr int64_t kSteps = 200'000;
constexpr int kSums = 16;  // more than the latency of two units

__attribute__((target("avx512f,avx512vnni"))) void multiply_int8() {
  __m512i sums[kSums];
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s)
    sums[s] = _mm512_setzero_si512();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < kSteps; ++i) {
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) {
      sums[s] = _mm512_dpbusd_epi32(sums[s], ones, ones);
      asm volatile("" : "+v"(sums[s]));  // must not be worked out beforehand
    }
  }
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
  _tile_loadconfig(&kTileShapes);
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

double bf16_rate(Team& team) {
  if (!has_bf16_gemm())
    return 0.0;
#if FP_ISA_LEVELS > 1
  if (isa() == Isa::kAmx)
    return tile_rate(team, false);
#endif
  return product_rate<Bf16>(team);
}

double int8_rate(Team& team) {
#if FP_ISA_LEVELS > 1
  if (isa() == Isa::kAmx && __builtin_cpu_supports("amx-int8"))
    return tile_rate(team, true);
  if (isa() >= Isa::kAvx512 && __builtin_cpu_supports("avx512vnni")) {
    return best_rate(team, 2.0 * 64 * kSums * kSteps, [](int64_t) { multiply_int8(); });
  }
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
  Ceilings found{.f32 = product_rate<float>(team),
                 .bf16 = bf16_rate(team),
                 .int8 = int8_rate(team),
                 .reads = {}};
  Buffer memory(kMemory);
  std::fill_n(memory.as<float>(), kMemory / sizeof(float), 1.0f);
  for (const int64_t bytes : {l2_bytes() / 2 * threads, l2_bytes() * 4 * threads, kMemory})
    found.reads.push_back({bytes, read_rate(team, memory, std::min(bytes, kMemory))});
  return found;
}

}  // namespace flowprefill
