#include "graph/sampling_params.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace flowprefill {
namespace {

void require(bool holds, const char* field, double value, const char* allowed) {
  if (!holds) {
    throw std::invalid_argument(std::string(field) + ": got " + std::to_string(value) +
                                ", expected " + allowed);
  }
}

}  // namespace

void check(std::span<const SamplingParams> sampling, int32_t num_sequences) {
  if (!sampling.empty() && sampling.size() != static_cast<size_t>(num_sequences)) {
    throw std::invalid_argument("sampling: got " + std::to_string(sampling.size()) + ", expected " +
                                std::to_string(num_sequences) + ", one per sequence, or none");
  }
  for (const SamplingParams& p : sampling) {
    require(std::isfinite(p.temperature) && p.temperature >= 0, "temperature", p.temperature,
            "a number from 0");
    require(p.top_k >= 0, "top_k", p.top_k, "at least 0 (0: all)");
    require(p.top_p > 0 && p.top_p <= 1, "top_p", p.top_p, "a number above 0, at most 1");
    require(p.min_p >= 0 && p.min_p <= 1, "min_p", p.min_p, "a number from 0 to 1");
    require(p.uniform >= 0 && p.uniform < 1, "uniform", p.uniform, "a number from 0, below 1");
  }
}

}  // namespace flowprefill
