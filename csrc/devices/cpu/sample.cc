#include "devices/cpu/sample.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace flowprefill {
namespace {

constexpr int32_t kBlock = 256;  // weights that are added up together
// Mostly a few large weights are all that is kept: those of at least so much are tried first.
constexpr float kLikely[] = {1e-2f, 1e-4f, std::numeric_limits<float>::min()};

// The tokens of one row that are left, and their weights.
class Distribution {
 public:
  // Fills it with all tokens of at least min_p. top: the largest logit.
  void reset(const RowKernels<float>& kernels, const float* logits, int32_t n, float top,
             const SamplingParams& params) {
    kernels_ = &kernels;
    const auto size = static_cast<size_t>(n);
    weights_.resize(std::max(weights_.size(), size));
    ids_.resize(std::max(ids_.size(), size));
    block_sums_.clear();
    n_ = n;
    is_narrowed_ = false;
    kernels_->weigh(logits, n, top, params, weights_.data());
    total_ = 0.0;
    for (int32_t begin = 0; begin < n; begin += kBlock) {
      block_sums_.push_back(kernels_->sum(weights_.data() + begin, std::min(kBlock, n - begin)));
      total_ += block_sums_.back();
    }
  }

  void keep_top_k(int32_t k) {
    keep_most_likely(k, [](float) { return 1.0; });
  }
  void keep_top_p(float p) {
    keep_most_likely(static_cast<double>(p) * total_,
                     [](float weight) { return static_cast<double>(weight); });
  }

  // The token at which the weights, added up in the order of ids, pass `uniform` of their total.
  int32_t token_at(float uniform) const {
    const double target = static_cast<double>(uniform) * total_;
    double sum = 0.0;
    if (is_narrowed_) {
      int32_t at = 0;
      while (at + 1 < count_ && (sum += weight(ids_[static_cast<size_t>(at)])) <= target)
        ++at;
      return ids_[static_cast<size_t>(at)];
    }
    size_t block = 0;
    for (; block + 1 < block_sums_.size() && sum + block_sums_[block] <= target; ++block)
      sum += block_sums_[block];
    auto id = static_cast<int32_t>(block) * kBlock;
    for (; id < n_; ++id) {
      sum += weight(id);
      if (sum > target)
        return id;
    }
    while (weight(--id) == 0.0) {  // rounding has left none: the last one
    }
    return id;
  }

 private:
  double weight(int32_t id) const { return weights_[static_cast<size_t>(id)]; }

  // Leaves the fewest most likely tokens that count for at least `wanted`, or all.
  template <class Counted>
  void keep_most_likely(double wanted, Counted counted) {
    const auto count_of = [&](const int32_t* begin, const int32_t* end) {
      double sum = 0.0;
      for (; begin < end; ++begin)
        sum += counted(weights_[static_cast<size_t>(*begin)]);
      return sum;
    };
    for (const float least : kLikely) {
      if (is_narrowed_)
        break;
      count_ = kernels_->find_at_least(weights_.data(), n_, least, ids_.data());
      is_narrowed_ = count_of(ids_.data(), ids_.data() + count_) >= wanted;
    }
    is_narrowed_ = true;  // what is left out weighs next to nothing
    const auto is_before = [this](int32_t a, int32_t b) {
      const float of_a = weights_[static_cast<size_t>(a)], of_b = weights_[static_cast<size_t>(b)];
      return of_a > of_b || (of_a == of_b && a < b);
    };
    // By halves: the sum is reached in the first one, or the second one is needed too.
    int32_t *begin = ids_.data(), *end = begin + count_;
    double sum = 0.0;
    while (end - begin > 1) {
      int32_t* middle = begin + (end - begin) / 2;
      std::nth_element(begin, middle, end, is_before);
      const double half = count_of(begin, middle);
      if (sum + half >= wanted) {
        end = middle;
      } else {
        sum += half;
        begin = middle;
      }
    }
    count_ = static_cast<int32_t>(end - ids_.data());
    std::sort(ids_.data(), end);
    total_ = 0.0;
    for (int32_t i = 0; i < count_; ++i)
      total_ += weight(ids_[static_cast<size_t>(i)]);
  }

  const RowKernels<float>* kernels_ = nullptr;
  std::vector<float> weights_;  // of all tokens; 0: below min_p
  std::vector<double> block_sums_;
  std::vector<int32_t> ids_;  // those left, ascending, once it is narrowed
  int32_t n_ = 0;
  int32_t count_ = 0;
  double total_ = 0.0;  // of those left
  bool is_narrowed_ = false;
};

}  // namespace

int32_t sample(const RowKernels<float>& kernels, const float* logits, int32_t n,
               const SamplingParams& params) {
  const int32_t likeliest = kernels.most_likely(logits, n);
  if (likeliest < 0)
    return kNoToken;
  if (params.temperature < kGreedyBelow)
    return likeliest;
  thread_local Distribution left;
  left.reset(kernels, logits, n, logits[likeliest], params);
  if (params.top_k > 0 && params.top_k < n)
    left.keep_top_k(params.top_k);
  if (params.top_p < 1.0f)
    left.keep_top_p(params.top_p);
  return left.token_at(params.uniform);
}

}  // namespace flowprefill
