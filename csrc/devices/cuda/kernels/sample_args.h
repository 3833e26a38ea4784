// SampleArgs: choosing the next token of each row of logits. Filled by OperatorKernels, which
// launches the kernel (kernels.h), read by sample_body.h.
#pragma once

#include "devices/cuda/kernels/portable.h"
#include "graph/sampling_params.h"

namespace flowprefill {

struct SampleArgs {
  const float* logits = nullptr;  // [rows, width]; -inf: ruled out
  int64_t ld_logits = 0;
  const SamplingParams* params = nullptr;  // [rows], on the device
  const int32_t* rows_in = nullptr;  // [rows] negative: padding, gives kNoToken; null: no padding
  int32_t* out = nullptr;            // [rows] token, or kNoToken
  int32_t rows = 0;
  int32_t width = 0;  // vocabulary, at most kMaxSampleWidth
};

inline constexpr int32_t kMaxSampleWidth = 1 << 22;

// Throws std::invalid_argument naming the field, its value and what is allowed.
void check(const SampleArgs& args);

}  // namespace flowprefill
