// The instruction set that this process computes with: the best one of the processor, or what
// FLOWPREFILL_ISA limits it to. Read by everything in this folder that has a choice of code.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace flowprefill {

// Each has what those before it have. kBaseline: what the build's compiler may assume (SSE2 on
// x86-64, NEON on aarch64).
enum class Isa : uint8_t { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* name_of(Isa isa);  // "baseline", "avx2", "avx512", "avx512_bf16", "amx"

// What this processor has and the kernel lets this process use, least first. Thread: any.
std::vector<Isa> available_isas();

// The one in use. FLOWPREFILL_ISA is read at the first call; a limited process limits oneDNN too,
// which heeds it unless torch has used it before. Throws std::invalid_argument for a name that is
// unknown or that this processor does not have, at every call. Thread: any; cost: one load.
Isa isa();

}  // namespace flowprefill
