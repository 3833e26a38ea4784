#include "devices/cuda/runtime/bucket.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>

namespace flowprefill {

std::vector<int32_t> default_buckets(int32_t max_tokens) {
  std::vector<int32_t> buckets;
  for (int64_t power = 1; power <= max_tokens; power *= 2) {
    const int64_t parts = power < 16 ? 1 : power < 64 || power >= kDecodeRows ? 2 : 4;
    for (int64_t part = 0; part < parts; ++part) {
      if (const int64_t bucket = power + part * power / parts; bucket <= max_tokens)
        buckets.push_back(static_cast<int32_t>(bucket));
    }
  }
  return buckets;
}

int32_t choose_bucket(int32_t tokens, std::span<const int32_t> buckets, double max_padding) {
  if (tokens < 1)
    throw std::invalid_argument("tokens: got " + std::to_string(tokens) + ", expected at least 1");
  if (!(max_padding >= 1.0)) {
    throw std::invalid_argument("max_padding: got " + std::to_string(max_padding) +
                                ", expected at least 1");
  }
  if (std::ranges::adjacent_find(buckets, std::greater_equal()) != buckets.end())
    throw std::invalid_argument("buckets: expected ascending numbers of tokens");
  const auto bucket = std::ranges::lower_bound(buckets, tokens);
  if (bucket == buckets.end() || *bucket > max_padding * tokens)
    return 0;
  return *bucket;
}

bool is_worth_graph(size_t num_kernels, double predicted_s, const GraphPolicy& policy) {
  return static_cast<double>(num_kernels) * policy.launch_s > policy.max_launch_share * predicted_s;
}

}  // namespace flowprefill
