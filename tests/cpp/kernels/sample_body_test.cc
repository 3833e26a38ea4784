// The sampling kernel's body: the cases of sample_suite.h, and padding, which only a GPU has.
#include "devices/cuda/kernels/sample_body.h"

#include "sample_suite.h"
#include "simt.h"

namespace flowprefill {
namespace sample_suite {
namespace {

using simt::Thread;

constexpr int32_t kThreads = 128;

std::vector<int32_t> sampled(const std::vector<float>& logits,
                             const std::vector<SamplingParams>& params, uint32_t seed,
                             const int32_t* rows_in) {
  const auto rows = static_cast<int32_t>(params.size());
  const int32_t width = static_cast<int32_t>(logits.size()) / rows;
  std::vector<int32_t> out(params.size(), -7);
  const SampleArgs args{.logits = logits.data(),
                        .ld_logits = width,
                        .params = params.data(),
                        .rows_in = rows_in,
                        .out = out.data(),
                        .rows = rows,
                        .width = width};
  check(args);
  simt::launch({.x = rows,
                .threads = kThreads,
                .shared_bytes = static_cast<size_t>(sample_shared_bytes(kThreads)),
                .seed = seed},
               [&](const Thread& t) { sample_body(t, args); });
  return out;
}

const Implementation kBody{"body", [](const auto& logits, const auto& params, uint32_t seed) {
                             return sampled(logits, params, seed, nullptr);
                           }};

INSTANTIATE_TEST_SUITE_P(Body, Sample, testing::Values(kBody), name_of);

TEST(SamplePadding, RowsOfPaddingGiveNoToken) {
  const std::vector<int32_t> rows_in = {4, -1, 0};
  const std::vector<SamplingParams> params(3, {.temperature = 0});
  EXPECT_EQ(sampled({1, 2, 2, 1, 1, 2}, params, 3, rows_in.data()), (std::vector{1, kNoToken, 1}));
}

}  // namespace
}  // namespace sample_suite
}  // namespace flowprefill
