// SamplingParams: how a device chooses the next token of one sequence. Given with a batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace flowprefill {

// temperature 0: the most likely token, whatever the rest says.
struct SamplingParams {
  float temperature = 0;
  int32_t top_k = 0;  // 0: all
  float top_p = 1;
  float min_p = 0;
  float uniform = 0;  // the random number, 0 <= uniform < 1
};

// Temperatures below are greedy, as in flowprefill/engine/sampler.py.
inline constexpr float kGreedyBelow = 1e-5f;
// The token of a row without an answer: NaN or +inf among the logits, or all of them -inf. On a GPU
// of padding too.
inline constexpr int32_t kNoToken = -1;

// One for each sequence of a batch, or none. Throws std::invalid_argument naming the field, its
// value and what is allowed.
void check(std::span<const SamplingParams> sampling, int32_t num_sequences);

}  // namespace flowprefill
