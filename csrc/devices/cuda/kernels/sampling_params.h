// SamplingParams: how the next token of one sequence is chosen. Given to CudaModel::make_program().
#pragma once

#include <cstdint>

namespace flowprefill {

// temperature 0: the most likely token, whatever the rest says.
struct SamplingParams {
  float temperature = 0;
  int32_t top_k = 0;  // 0: all
  float top_p = 1;
  float min_p = 0;
  float uniform = 0;  // the random number, 0 <= uniform < 1
};

}  // namespace flowprefill
