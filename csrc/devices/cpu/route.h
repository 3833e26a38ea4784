// route_row(): which experts of a mixture one row has, and their weights. Used by experts.cc.
#pragma once

#include <cstdint>

namespace flowprefill {

// out[2 * slots]: the experts of the largest logits, each once, the largest first and of equal ones
// the lower; then their weights: the softmax of all logits, or of the chosen ones alone. NaN makes
// the weights NaN.
void route_row(const float* logits, int32_t experts, int32_t slots, bool sums_to_one, float* out);

}  // namespace flowprefill
