// The kernels that keep something of all rows, scores and means, on the device against plain loops.
#include <algorithm>

#include "device_test.h"

namespace flowprefill::testing {
namespace {

// Rows of two sequences, then padding.
const std::vector<int32_t> kSequences = {1, 1, 1, 1, 1, 2, 2, 0, 0};
const auto kRows = static_cast<int32_t>(kSequences.size());

class Kept : public DeviceTest {};

TEST_F(Kept, ScoresOfRows) {
  for (const int32_t width : {7, 203, kIsDouble ? 1500 : 128256}) {
    forget();
    const int32_t ld = width + 1;
    auto& sequences = add("sequences", kSequences);
    std::vector<int32_t> ids;
    for (int32_t i = 0; i < kRows; ++i)
      ids.push_back(integer(0, width - 1));
    auto& tokens = add("tokens", ids);
    auto& next_tokens = add("next_tokens", std::vector<int32_t>{width - 1, -1});
    std::vector<float> values = normals(static_cast<size_t>(kRows * ld), 3.0f);
    std::fill_n(values.begin() + 2 * ld, width, 0.5f);  // all alike: ties
    auto& logits = add("logits", values);
    constexpr size_t kColumns = PromptScore::kColumns;
    auto& out = add("out", std::vector<float>(static_cast<size_t>(kRows + 1) * kColumns, -7.0f));
    std::vector<double> sums(out.initial().size(), 0.0);  // all but log_sum_exp are exact
    for (size_t i = 0; i < sums.size(); i += kColumns)
      sums[i] = 10.0;
    out.allow(kFloatRounding, 0.0, sums);
    const auto args = [&](Place p) {
      return ScoreArgs{.batch = {.tokens = tokens.at(p), .sequences = sequences.at(p)},
                       .next_tokens = next_tokens.at(p),
                       .logits = logits.at(p),
                       .ld_logits = ld,
                       .out = reinterpret_cast<PromptScore*>(out.at(p)),
                       .rows = kRows,
                       .batch_rows = kRows,
                       .width = width};
    };
    expect_kernel([&](cudaStream_t s) { return launch_score(args(Place::kDevice), s); },
                  [&] { fake_kernels::score(args(Place::kHost)); });
  }
}

TEST_F(Kept, MeansOfSequences) {
  for (const int32_t width : {3, 100, 4096}) {
    forget();
    auto& sequences = add("sequences", kSequences);
    auto& last_rows = add("last_rows", std::vector<int32_t>{4, 6, -1});
    auto& in = add("in", normals(static_cast<size_t>(kRows * width)));
    auto& out = add("out", std::vector<float>(static_cast<size_t>(3 * width), -7.0f));
    out.allow(kFloatRounding, kFloatRounding);
    const auto args = [&](Place p) {
      return PoolArgs{.batch = {.sequences = sequences.at(p)},
                      .last_rows = last_rows.at(p),
                      .in = in.at(p),
                      .ld_in = width,
                      .out = out.at(p),
                      .ld_out = width,
                      .row_begin = 0,
                      .rows = kRows,
                      .width = width};
    };
    expect_kernel([&](cudaStream_t s) { return launch_pool(args(Place::kDevice), s); },
                  [&] { fake_kernels::pool(args(Place::kHost)); });
  }
}

}  // namespace
}  // namespace flowprefill::testing
