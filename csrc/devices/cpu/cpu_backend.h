// CpuBackend: one model on the processor. Made by csrc/bindings.
#pragma once

#include <cstdint>
#include <memory>

#include "devices/cpu/block_matrix.h"
#include "graph/backend.h"

namespace flowprefill {

// bf16 multiplies bf16 and keeps K and V so; the residual stream is float in both.
enum class CpuElement : uint8_t { kFloat, kBf16 };

// How weights of products are kept: as the activations, or in 8 bits (int8_linear.h).
enum class CpuQuantization : uint8_t { kNone, kInt8 };

// How numbers are kept on the CPU.
struct CpuNumbers {
  CpuElement element = CpuElement::kFloat;
  CpuQuantization quantization = CpuQuantization::kNone;
};

// Where the CPU wants its cuts, for a team of so many threads.
CutRules cpu_cuts(int threads, CpuNumbers numbers);

// formats: of tensors that come in quantised blocks and are to stay so, whatever `numbers` say.
// Throws std::invalid_argument: threads < 1, bf16 or int8 on a processor that does not multiply it,
// an operator that the CPU does not have.
std::unique_ptr<Backend> make_cpu_backend(ModelGraph graph, CpuNumbers numbers, int threads,
                                          BlockFormats formats = {});

}  // namespace flowprefill
