// Chooses the next token of a row of logits on the CPU: the most likely, or a random one. Called by
// CpuOperators.
#pragma once

#include <cstdint>

#include "devices/cpu/row_kernels.h"
#include "graph/sampling_params.h"

namespace flowprefill {

// logits: [n], n >= 1; -inf: ruled out. params have been checked. kNoToken: there is no answer.
//
// The order of filters, and of tokens when drawing, is that of flowprefill/engine/sampler.py:
// temperature, min_p, top_k, top_p, each among what the one before left; of equally likely tokens
// those with lower ids stay; then the distribution in order of ids is inverted. The same uniform
// number so gives the same token, unless it, or a threshold, falls within the rounding of the
// weights. Nothing depends on other rows or on the thread.
//
// Thread: any; keeps memory for the longest row it has seen, one for each thread.
int32_t sample(const RowKernels<float>& kernels, const float* logits, int32_t n,
               const SamplingParams& params);

}  // namespace flowprefill
