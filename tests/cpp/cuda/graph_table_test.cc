// How many executables a model of 8 billion parameters needs by granularity; prints the table of
// docs/cuda.md. The plans are the real planner's, with the rates of a large GPU.
#include <gtest/gtest.h>

#include <cstdio>
#include <string>
#include <vector>

#include "cuda/graph_estimate.h"
#include "model/planner.h"

namespace flowprefill::testing {
namespace {

ModelConfig eight_billion() {
  ModelConfig config;
  config.vocab_size = 128256;
  config.hidden_size = 4096;
  config.intermediate_size = 14336;
  config.num_layers = 32;
  config.num_heads = 32;
  config.num_kv_heads = 8;
  config.head_dim = 128;
  config.windows.assign(32, 0);
  return config;
}

// Assumed, not measured: what one large GPU reaches in bf16. A "thread" of the planner stands for
// the 64 rows of one tile of a matrix kernel, so 64 of them make slices of 1024 to 4096 rows.
PlanOptions plan_options(Granularity granularity) {
  PlanOptions options;
  options.granularity = granularity;
  options.budget_s = 2e-3;
  options.threads = 64;
  options.rates = {.gemm_flops_per_s = 5e14,
                   .attention_flops_per_s = 3e14,
                   .weight_bytes_per_s = 2.5e12,
                   .step_overhead_s = 5e-6};
  return options;
}

Batch batch_of(int32_t rows) {
  Batch batch;
  batch.tokens.assign(static_cast<size_t>(rows), 0);
  batch.sequences.push_back({.row_begin = 0, .rows = rows, .context = 0, .block_table = {}});
  return batch;
}

size_t num_kernels(const Step& step) {
  return static_cast<size_t>(step.last) - static_cast<size_t>(step.first) + 1;
}

SegmentEstimate estimate_of(const Plan& plan, size_t begin, size_t end, int32_t bucket) {
  const Step& first = plan.steps[begin];
  const Step& last = plan.steps[end - 1];
  SegmentEstimate segment;
  segment.shape = {.first_op = static_cast<int32_t>(first.first),
                   .last_op = static_cast<int32_t>(last.last),
                   .first_layer = first.layer,
                   .last_layer = last.layer,
                   .row_begin = first.row_begin,
                   .row_end = last.row_end};
  segment.bucket = bucket;
  for (size_t i = begin; i < end; ++i) {
    segment.num_kernels += num_kernels(plan.steps[i]);
    segment.predicted_s += plan.steps[i].predicted_s;
  }
  return segment;
}

// With attention eager a segment that contains it falls into pieces: what is between two attentions
// can be a graph.
void add_plan(std::vector<SegmentEstimate>& segments, const Plan& plan, int32_t bucket,
              bool is_attention_eager) {
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    const size_t end = i + 1 < plan.segments.size() ? plan.segments[i + 1] : plan.steps.size();
    size_t begin = plan.segments[i];
    for (size_t s = begin; is_attention_eager && s < end; ++s) {
      if (plan.steps[s].first != Op::kAttention)
        continue;
      if (s > begin)
        segments.push_back(estimate_of(plan, begin, s, bucket));
      segments.push_back(estimate_of(plan, s, s + 1, bucket));
      segments.back().is_capturable = false;
      begin = s + 1;
    }
    if (begin < end)
      segments.push_back(estimate_of(plan, begin, end, bucket));
  }
}

GraphEstimate estimate(Granularity granularity, const std::vector<int32_t>& buckets,
                       const GraphCosts& costs, bool is_attention_eager) {
  std::vector<SegmentEstimate> segments;
  const ModelConfig config = eight_billion();
  for (const int32_t bucket : buckets)
    add_plan(segments, make_plan(config, batch_of(bucket), plan_options(granularity)), bucket,
             is_attention_eager);
  return estimate_graphs(segments, costs);
}

std::vector<int32_t> powers_of_two() {
  std::vector<int32_t> buckets;
  for (int32_t bucket = 1; bucket <= 32768; bucket *= 2)
    buckets.push_back(bucket);
  return buckets;
}

// As engines do that capture every size: steps of 64 tokens up to 8192.
std::vector<int32_t> fine() {
  std::vector<int32_t> buckets;
  for (int32_t bucket = 64; bucket <= 8192; bucket += 64)
    buckets.push_back(bucket);
  return buckets;
}

GraphCosts everything_a_graph(int32_t num_lanes) {
  GraphCosts costs{.num_lanes = num_lanes};
  costs.policy.max_launch_share = 0;
  return costs;
}

void print(const char* name, const GraphEstimate& e) {
  std::printf("  %-58s %8zu %8zu %8zu %9.2f %9.1f\n", name, e.num_segments, e.num_eager,
              e.num_executables, static_cast<double>(e.bytes) / (1 << 30), e.capture_s);
}

TEST(GraphTable, budget_segments_need_hundreds_of_executables_not_tens_of_thousands) {
  const GraphEstimate every =
      estimate(Granularity::kOperator, fine(), everything_a_graph(1), false);
  const GraphEstimate coarse =
      estimate(Granularity::kOperator, powers_of_two(), everything_a_graph(2), false);
  const GraphEstimate merged =
      estimate(Granularity::kBudget, powers_of_two(), everything_a_graph(2), false);
  const GraphEstimate budget =
      estimate(Granularity::kBudget, powers_of_two(), {.num_lanes = 2}, false);
  const GraphEstimate eager_attention =
      estimate(Granularity::kBudget, powers_of_two(), {.num_lanes = 2}, true);
  std::printf("  %-58s %8s %8s %8s %9s %9s\n", "8B shape, 16 buckets of 1 to 32768 tokens, 2 lanes",
              "segments", "eager", "graphs", "GiB", "capture s");
  print("operator, 128 buckets of 64 tokens, 1 lane, all graphs", every);
  print("operator, all graphs", coarse);
  print("budget 2 ms, all graphs", merged);
  print("budget 2 ms, graph where worth it, attention in it", budget);
  print("budget 2 ms, graph where worth it, attention eager", eager_attention);
  EXPECT_GT(every.num_executables, 10'000u);
  EXPECT_LT(budget.num_executables, 1000u);
  EXPECT_GT(budget.num_executables, 50u);
  EXPECT_LT(eager_attention.num_executables, 1000u);
  EXPECT_LT(eager_attention.bytes, size_t{2} << 30);
}

TEST(GraphTable, estimate_counts_each_key_once_for_every_lane) {
  const SegmentEstimate one{.shape = {.first_op = 1}, .bucket = 8, .num_kernels = 3};
  SegmentEstimate eager = one;
  eager.is_capturable = false;
  SegmentEstimate slow = one;
  slow.predicted_s = 1.0;
  SegmentEstimate other = one;
  other.bucket = 16;
  const std::vector<SegmentEstimate> segments = {one, one, eager, slow, other};
  const GraphEstimate e = estimate_graphs(segments, {.num_lanes = 3, .bytes_per_kernel = 10});
  EXPECT_EQ(e.num_segments, 5u);
  EXPECT_EQ(e.num_eager, 2u);
  EXPECT_EQ(e.num_executables, 6u);
  EXPECT_EQ(e.num_kernels, 18u);
  EXPECT_EQ(e.bytes, 180u);
}

}  // namespace
}  // namespace flowprefill::testing
