// The sampling kernel on the device against the sampler written with sorts and doubles.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "device_test.h"

namespace flowprefill::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kError = 2e-6f;  // of a cumulated share, by the device's exponential

class Sample : public DeviceTest {
 protected:
  void make(int32_t width, std::vector<float> logits, std::vector<SamplingParams> params) {
    forget();
    width_ = width;
    rows_ = static_cast<int32_t>(params.size());
    logits_ = &add("logits", std::move(logits));
    params_ = &add("params", std::move(params));
    std::vector<int32_t> rows_in(static_cast<size_t>(rows_), 0);
    rows_in.back() = -1;  // padding
    rows_in_ = &add("rows_in", std::move(rows_in));
    out_ = &add("out", std::vector<int32_t>(static_cast<size_t>(rows_) + 1, -7));
  }

  SampleArgs args(Place p) {
    return {.logits = logits_->at(p),
            .ld_logits = width_ + 1,
            .params = params_->at(p),
            .rows_in = rows_in_->at(p),
            .out = out_->at(p),
            .rows = rows_,
            .width = width_};
  }

  std::vector<float> random_logits(int32_t rows, int32_t width) {
    std::vector<float> out = normals(static_cast<size_t>(rows * (width + 1)), 3.0f);
    for (float& value : out)
      value = integer(0, 9) == 0 ? -kInfinity : value;
    for (int32_t row = 0; row < rows; ++row)
      out[static_cast<size_t>(row * (width + 1))] = 1.0f;  // one at least is left
    return out;
  }

  // What the host's sampler gives where top_p and the random number are off by `error`.
  std::vector<int32_t> tokens(float top_p_error, float uniform_error) {
    logits_->host() = logits_->initial();
    rows_in_->host() = rows_in_->initial();
    params_->host() = params_->initial();
    for (SamplingParams& p : params_->host()) {
      p.top_p = p.top_p < 1 ? p.top_p + top_p_error : p.top_p;
      p.uniform = std::clamp(p.uniform + uniform_error, 0.0f, 0.9999999f);
    }
    fake_kernels::sample(args(Place::kHost));
    return out_->host();
  }

  Array<float>* logits_ = nullptr;
  Array<SamplingParams>* params_ = nullptr;
  Array<int32_t>* rows_in_ = nullptr;
  Array<int32_t>* out_ = nullptr;  // the fourth operand
  int32_t rows_ = 0;
  int32_t width_ = 0;
};

TEST_F(Sample, GivesTheTokenOfTheSortingSampler) {
  const std::vector<int32_t> wide = {128256, 128259, 200003};
  for (const int32_t width :
       kIsDouble ? std::vector{1, 203, 350} : std::vector{1, 203, wide[0], wide[1], wide[2]}) {
    std::vector<SamplingParams> params;
    for (int i = 0; i < 12; ++i) {
      params.push_back({.temperature = 0.3f + 0.2f * static_cast<float>(i),
                        .top_k = i % 3 == 0 ? 0 : 1 + i * 5,
                        .top_p = i % 2 == 0 ? 1.0f : 0.5f + 0.04f * static_cast<float>(i),
                        .min_p = i % 4 == 3 ? 0.02f : 0.0f,
                        .uniform = static_cast<float>(integer(0, 99)) / 100.0f});
    }
    make(width, random_logits(12, width), params);
    const auto fetched =
        run([&](cudaStream_t s) { return launch_sample(args(Place::kDevice), s); });
    std::vector<int32_t> got(out_->initial().size());
    std::memcpy(got.data(), fetched[3].data(), fetched[3].size());
    std::vector<std::set<int32_t>> allowed(got.size());
    for (const float top_p : {-kError, 0.0f, kError}) {
      for (const float uniform : {-kError, 0.0f, kError}) {
        const std::vector<int32_t> some = tokens(top_p, uniform);
        for (size_t row = 0; row < some.size(); ++row)
          allowed[row].insert(some[row]);
      }
    }
    for (size_t row = 0; row < got.size(); ++row)
      EXPECT_TRUE(allowed[row].contains(got[row])) << "row " << row << " of width " << width;
    EXPECT_EQ(got[11], kNoToken);
    EXPECT_EQ(got[12], -7);
  }
}

// No rounding decides here, so the token is the host's.
TEST_F(Sample, ExactCases) {
  constexpr int32_t kWidth = 203;
  std::vector<float> logits = random_logits(8, kWidth);
  const auto row = [&](int32_t index) { return logits.begin() + index * (kWidth + 1); };
  std::fill_n(row(2), kWidth, -kInfinity);  // no answer
  *(row(3) + 7) = std::nanf("");            // no answer
  std::fill_n(row(4), kWidth, 0.25f);       // all alike: the third of four
  for (const int32_t index : {5, 6}) {      // one is far ahead: min_p or top_p leave no other
    std::fill_n(row(index), kWidth, 0.0f);
    *(row(index) + 5) = 2.0f;
  }
  make(kWidth, logits,
       {{.temperature = 0, .uniform = 0.9f},
        {.temperature = 1, .top_k = 1, .uniform = 0.9f},
        {.temperature = 1, .uniform = 0.5f},
        {.temperature = 1, .uniform = 0.5f},
        {.temperature = 1, .top_k = 4, .uniform = 0.6f},
        {.temperature = 1, .min_p = 0.5f, .uniform = 0.99f},
        {.temperature = 1, .top_p = 0.01f, .uniform = 0.99f},
        {.temperature = 1}});
  expect_kernel([&](cudaStream_t s) { return launch_sample(args(Place::kDevice), s); },
                [&] { fake_kernels::sample(args(Place::kHost)); });
}

// Thresholds among more equal tokens than the kernel's list has room for; whole numbers of weights,
// so no rounding decides.
TEST_F(Sample, ManyEqualTokens) {
  constexpr int32_t kWidth = kIsDouble ? 2503 : 128259;
  std::vector<float> logits(size_t{10} * (kWidth + 1), 0.25f);
  for (const int32_t index : {6, 7})  // one is far ahead
    logits[static_cast<size_t>(index * (kWidth + 1) + kWidth / 2)] = 60.0f;
  for (int32_t i = 0; i < kWidth; ++i)  // as likely as each other, but not equal
    logits[static_cast<size_t>(8 * (kWidth + 1) + i)] = static_cast<float>(i % 5 - 2) * 1e-40f;
  make(kWidth, logits,
       {{.temperature = 1, .uniform = 0.5f},
        {.temperature = 1, .top_k = 4, .uniform = 0.6f},
        {.temperature = 1, .top_k = kWidth, .uniform = 0.7f},
        {.temperature = 1, .top_k = kWidth - 1, .uniform = 0.9999999f},
        {.temperature = 1, .top_p = 0.5f, .uniform = 0.8f},
        {.temperature = 1, .top_k = 2000, .top_p = 0.25f, .min_p = 0.5f, .uniform = 0.7f},
        {.temperature = 1, .top_k = 1500, .top_p = 0.999f, .uniform = 0.9f},
        {.temperature = 1, .min_p = 0.1f, .uniform = 0.9f},
        {.temperature = 1, .top_k = 7, .uniform = 0.9f},
        {.temperature = 1}});
  expect_kernel([&](cudaStream_t s) { return launch_sample(args(Place::kDevice), s); },
                [&] { fake_kernels::sample(args(Place::kHost)); });
}

// The random number of a run is in device memory, not in the graph.
TEST_F(Sample, AGraphReadsParametersAtEachReplay) {
  constexpr int32_t kWidth = 203;
  make(kWidth, std::vector<float>(3 * (kWidth + 1), 0.5f),
       {{.temperature = 1, .uniform = 0.1f}, {.temperature = 1, .uniform = 0.3f}, {}});
  const auto launch = [&](cudaStream_t s) { return launch_sample(args(Place::kDevice), s); };
  const auto plain = [&] { fake_kernels::sample(args(Place::kHost)); };
  expect_kernel(launch, plain);
  expect_after_change(launch, plain, [&] {
    params_->initial()[0].uniform = 0.8f;
    params_->initial()[1].top_k = 2;
  });
}

}  // namespace
}  // namespace flowprefill::testing
