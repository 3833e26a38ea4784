// What the segments of a run took, by kind: which records count, and how far one may stand out.
#include "graph/operator_times.h"

#include <gtest/gtest.h>

#include <utility>

namespace flowprefill::testing {
namespace {

constexpr MachineRates kRates{.gemm_flops_per_s = 1e9,
                              .attention_flops_per_s = 1e9,
                              .weight_bytes_per_s = 1e9,
                              .cache_bytes_per_s = 1e9};
constexpr OperatorWork kProduct{.product_flops = 1e6, .attention_flops = 1e5};  // 1.1 ms
constexpr OperatorWork kAttention{.attention_flops = 2e6};                      // 2 ms

// Segments of given work, which compute nothing.
class WorkProgram final : public ModelProgram {
 public:
  explicit WorkProgram(std::vector<OperatorWork> work) : work_(std::move(work)) {}

  size_t size() const override { return work_.size(); }
  SegmentLabel label(size_t) const override { return {}; }
  void execute(size_t, const ExecutionContext&) override {}
  std::optional<OperatorWork> work(size_t i) const override { return work_[i]; }
  const float* logits() const override { return nullptr; }
  int64_t logits_stride() const override { return 0; }
  int32_t num_sequences() const override { return 1; }
  int32_t vocab_size() const override { return 1; }
  size_t workspace_bytes() const override { return 0; }

 private:
  const std::vector<OperatorWork> work_;
};

class OperatorTimesTest : public ::testing::Test {
 protected:
  void executed(uint64_t run_id, uint32_t segment, double seconds) {
    const int64_t start_ns = now_ns_;
    now_ns_ += static_cast<int64_t>(seconds * 1e9);
    timeline_.append({.run_id = run_id,
                      .segment = segment,
                      .label = {},
                      .start_ns = start_ns,
                      .end_ns = now_ns_});
  }
  std::vector<OperatorTime> times_of(uint64_t run_id, std::vector<OperatorWork> work) {
    auto program = std::make_unique<WorkProgram>(std::move(work));
    const WorkProgram& own = *program;
    const RunRef run = make_run(run_id, std::move(program));
    return operator_times(timeline_, *run, own, kRates);
  }

  Timeline timeline_{64};
  int64_t now_ns_ = 1'000'000;
};

TEST_F(OperatorTimesTest, segments_are_added_up_by_the_kind_that_fills_them) {
  executed(7, 0, 2e-3);
  executed(8, 0, 1.0);  // another run in between
  executed(7, 1, 1e-3);
  executed(7, 2, 3e-3);
  const auto times = times_of(7, {kProduct, kAttention, kProduct});
  ASSERT_EQ(times.size(), 2u);
  EXPECT_EQ(times[0].segments, 2u);
  EXPECT_NEAR(times[0].seconds, 5e-3, 1e-9);
  EXPECT_NEAR(times[0].work.product_flops, 2e6, 1e-3);
  EXPECT_NEAR(times[0].work.attention_flops, 2e5, 1e-3);
  EXPECT_EQ(times[1].segments, 1u);
  EXPECT_NEAR(times[1].seconds, 1e-3, 1e-9);
  EXPECT_NEAR(times[1].work.attention_flops, 2e6, 1e-3);
}

TEST_F(OperatorTimesTest, a_stalled_segment_counts_as_three_times_the_median) {
  for (uint32_t i = 0; i < 9; ++i)
    executed(1, i, i == 4 ? 1.0 : 2.2e-3);
  const auto times = times_of(1, std::vector<OperatorWork>(9, kProduct));
  ASSERT_EQ(times.size(), 1u);
  EXPECT_NEAR(times[0].seconds, (8 + kMostOfMedian) * 2.2e-3, 1e-9);
}

TEST_F(OperatorTimesTest, what_was_overwritten_is_left_out) {
  for (uint32_t i = 0; i < 100; ++i)
    executed(1, i, 1e-3);
  const auto times = times_of(1, std::vector<OperatorWork>(100, kProduct));
  ASSERT_EQ(times.size(), 1u);
  EXPECT_EQ(times[0].segments, 64u);
  EXPECT_TRUE(times_of(2, {kProduct}).empty());
}

}  // namespace
}  // namespace flowprefill::testing
