#include "devices/cpu/route.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace flowprefill {

void route_row(const float* logits, int32_t experts, int32_t slots, bool sums_to_one, float* out) {
  thread_local std::vector<bool> is_taken;
  is_taken.assign(static_cast<size_t>(experts), false);
  for (int32_t slot = 0; slot < slots; ++slot) {
    int32_t best = -1;
    for (int32_t e = 0; e < experts; ++e) {
      if (!is_taken[static_cast<size_t>(e)] && (best < 0 || logits[e] > logits[best]))
        best = e;
    }
    is_taken[static_cast<size_t>(best)] = true;
    out[slot] = static_cast<float>(best);
  }
  // NaN that no row chooses counts too: it is as much a fault of the model.
  const float* nan = std::find_if(logits, logits + experts, [](float x) { return std::isnan(x); });
  const float largest = nan < logits + experts ? *nan : logits[static_cast<int32_t>(out[0])];
  float sum = 0;
  for (int32_t e = 0; e < experts && !sums_to_one; ++e)
    sum += std::exp(logits[e] - largest);
  for (int32_t slot = 0; slot < slots; ++slot) {
    out[slots + slot] = std::exp(logits[static_cast<int32_t>(out[slot])] - largest);
    sum += sums_to_one ? out[slots + slot] : 0.0f;
  }
  for (int32_t slot = 0; slot < slots; ++slot)
    out[slots + slot] /= sum;
}

}  // namespace flowprefill
