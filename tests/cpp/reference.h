// Plain loops in double that every kernel, of the CPU and of CUDA, is compared with: activations,
// norm, rotation, attention, sampling. Used by the tests of kernels and by the doubles of kernels.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numbers>
#include <span>
#include <vector>

namespace flowprefill::reference {

inline double silu(double x) {
  return x / (1.0 + std::exp(-x));
}

// The tanh form.
inline double gelu(double x) {
  const double inner = std::sqrt(2.0 / std::numbers::pi) * (x + 0.044715 * x * x * x);
  return 0.5 * x * (1.0 + std::tanh(inner));
}

inline double soft_capped(double x, double cap) {
  return cap * std::tanh(x / cap);
}

template <typename Row>
double inverse_rms(const Row& x, double eps) {
  double sum = 0;
  for (const double value : x)
    sum += value * value;
  return 1.0 / std::sqrt(sum / static_cast<double>(x.size()) + eps);
}

// Turns x[i] and x[i + n] by the angle whose cosine and sine are cos[i] and sin[i]; n = size / 2.
template <typename Row, typename Angles>
void rotate(Row& x, const Angles& cos, const Angles& sin) {
  const size_t half = x.size() / 2;
  for (size_t i = 0; i < half; ++i) {
    const double a = x[i];
    const double b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

// The mean of the values value(key, i), i < dim, of the keys [first, end), weighted by
// 2^score(key).
template <typename Score, typename Value>
std::vector<double> attended(int32_t first, int32_t end, size_t dim, Score score, Value value) {
  std::vector<double> scores;
  for (int32_t key = first; key < end; ++key)
    scores.push_back(score(key));
  const double peak = *std::ranges::max_element(scores);
  std::vector<double> out(dim);
  double sum = 0;
  for (int32_t key = first; key < end; ++key) {
    const double p = std::exp2(scores[static_cast<size_t>(key - first)] - peak);
    sum += p;
    for (size_t i = 0; i < dim; ++i)
      out[i] += p * value(key, i);
  }
  for (double& x : out)
    x /= sum;
  return out;
}

// The token that flowprefill/engine/sampler.py chooses with this random number: tokens less likely
// than min_p of the best leave first, then all but the top_k best, then those behind the share
// top_p; the random number falls among the rest in the order of their ids.
template <typename Params>
int32_t sampled(std::span<const float> logits, const Params& params, double top_p, double uniform) {
  const double top = *std::ranges::max_element(logits);
  std::vector<double> weights;
  std::vector<int32_t> left;
  for (const float logit : logits) {
    weights.push_back(std::exp((logit - top) / params.temperature));
    if (weights.back() >= params.min_p)
      left.push_back(static_cast<int32_t>(weights.size()) - 1);
  }
  const auto weight = [&](int32_t id) { return weights[static_cast<size_t>(id)]; };
  const auto total = [&] {
    double sum = 0;
    for (const int32_t id : left)
      sum += weight(id);
    return sum;
  };
  std::ranges::stable_sort(left, std::greater(),
                           [&](int32_t id) { return logits[static_cast<size_t>(id)]; });
  if (params.top_k > 0)
    left.resize(std::min(left.size(), static_cast<size_t>(params.top_k)));
  if (top_p < 1) {
    const double wanted = top_p * total();
    double sum = 0;
    size_t count = 0;
    while (count < left.size() && (count == 0 || sum < wanted))
      sum += weight(left[count++]);
    left.resize(count);
  }
  std::ranges::sort(left);
  const double target = uniform * total();
  double sum = 0;
  for (const int32_t id : left) {
    sum += weight(id);
    if (sum > target)
      return id;
  }
  return left.back();
}

}  // namespace flowprefill::reference
