// Sampling on the CPU: the cases of sample_suite.h with every instruction set's kernels.
#include "devices/cpu/sample.h"

#include "devices/cpu/isa.h"
#include "devices/cpu/row_kernel_tables.h"
#include "sample_suite.h"

namespace flowprefill {
namespace sample_suite {
namespace {

template <const RowKernels<float>& kKernels>
std::vector<int32_t> sampled(const std::vector<float>& logits,
                             const std::vector<SamplingParams>& params, uint32_t /*seed*/) {
  const auto width = static_cast<int32_t>(logits.size() / params.size());
  std::vector<int32_t> tokens;
  for (const SamplingParams& each : params) {
    const float* row = logits.data() + static_cast<ptrdiff_t>(tokens.size()) * width;
    tokens.push_back(flowprefill::sample(kKernels, row, width, each));
  }
  return tokens;
}

std::vector<Implementation> implementations() {
  std::vector<Implementation> found{{"baseline", sampled<isa_baseline::kRowKernelsF32>}};
#if FP_ISA_LEVELS > 1
  const Isa best = available_isas().back();
  if (best >= Isa::kAvx2)
    found.push_back({"avx2", sampled<isa_avx2::kRowKernelsF32>});
  if (best >= Isa::kAvx512)
    found.push_back({"avx512", sampled<isa_avx512::kRowKernelsF32>});
  if (best >= Isa::kAvx512Bf16)
    found.push_back({"avx512bf16", sampled<isa_avx512bf16::kRowKernelsF32>});
#endif
  return found;
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, Sample, testing::ValuesIn(implementations()), name_of);

}  // namespace
}  // namespace sample_suite
}  // namespace flowprefill
