#include "devices/cpu/isa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <stdexcept>

namespace flowprefill {
namespace {

constexpr const char* kVariable = "FLOWPREFILL_ISA";
constexpr std::array kNames{"baseline", "avx2", "avx512", "avx512_bf16", "amx"};
// The same in oneDNN's words.
constexpr std::array kOneDnnNames{"SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "ALL"};

#if FP_ISA_LEVELS > 1
// Tiles are a state that Linux keeps for processes which have asked for it, threads included. It
// refuses where it is older than 5.16, where a sandbox does, and while a thread has a signal stack
// that is too small; oneDNN then computes without tiles, and so must those who choose by isa().
bool may_use_tiles() {
#if defined(__x86_64__) && defined(SYS_arch_prctl)
  constexpr long kAsk = 0x1023;  // ARCH_REQ_XCOMP_PERM, which older headers lack
  constexpr long kTileData = 18;
  return syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#else
  return false;
#endif
}
#endif

Isa best_of_processor() {
#if FP_ISA_LEVELS > 1
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2"))
    return Isa::kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512cd"))
    return Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512bf16"))
    return Isa::kAvx512;
  const bool has_tiles = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                         __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("avx512vbmi");
  return has_tiles && may_use_tiles() ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kBaseline;
#endif
}

Isa choose() {
  const char* asked = std::getenv(kVariable);
  if (asked == nullptr || *asked == '\0')
    return best_of_processor();
  std::string allowed;
  for (const Isa one : available_isas()) {
    if (std::string(asked) == name_of(one)) {
      setenv("ONEDNN_MAX_CPU_ISA", kOneDnnNames[static_cast<size_t>(one)], /*overwrite=*/0);
      return one;
    }
    allowed += (allowed.empty() ? "" : ", ") + std::string(name_of(one));
  }
  throw std::invalid_argument(std::string(kVariable) + ": got '" + asked + "', expected one of " +
                              allowed + " on this processor");
}

}  // namespace

const char* name_of(Isa isa) {
  return kNames[static_cast<size_t>(isa)];
}

std::vector<Isa> available_isas() {
  std::vector<Isa> found;
  for (size_t i = 0; i <= static_cast<size_t>(best_of_processor()); ++i)
    found.push_back(static_cast<Isa>(i));
  return found;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace flowprefill
