#include "devices/cuda/backend/plan_builder.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <utility>

#include "devices/cuda/backend/batch_inputs.h"

namespace flowprefill {
namespace {

constexpr int32_t kLeastContext = 1024;  // shorter ones make no difference worth a plan
constexpr size_t kMaxPlans = 512;

int32_t power_of_two(int64_t least) {
  return static_cast<int32_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(least, 1))));
}

size_t segment_end(const Plan& plan, size_t i) {
  return i + 1 < plan.segments.size() ? plan.segments[i + 1] : plan.steps.size();
}

std::vector<double> by_segment(const Plan& plan, const std::vector<double>& step_s) {
  std::vector<double> seconds;
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    const auto begin = step_s.begin() + plan.segments[i];
    const auto end = step_s.begin() + static_cast<ptrdiff_t>(segment_end(plan, i));
    seconds.push_back(std::accumulate(begin, end, 0.0));
  }
  return seconds;
}

double total(const std::vector<double>& seconds) {
  return std::accumulate(seconds.begin(), seconds.end(), 0.0);
}

std::vector<double> planned_steps(const Plan& plan) {
  std::vector<double> seconds;
  seconds.reserve(plan.steps.size());
  for (const Step& step : plan.steps)
    seconds.push_back(step.predicted_s);
  return seconds;
}

std::vector<AttentionRows> attention_of(const Plan& plan) {
  std::vector<AttentionRows> rows;
  for (const Step& step : plan.steps) {
    if (step.first <= Op::kAttention && step.last >= Op::kAttention)
      rows.push_back({.begin = step.row_begin, .end = step.row_end, .base = step.base});
  }
  std::ranges::sort(rows);
  rows.erase(std::ranges::unique(rows).begin(), rows.end());
  return rows;
}

// As TransformerProgram::label() of the CPU tells it.
SegmentLabel label_of(std::span<const Step> steps) {
  const Step& first = steps.front();
  const Step& last = steps.back();
  SegmentLabel label{.op = op_name(first.first), .row_begin = first.row_begin};
  label.layer = first.first == Op::kEmbed || first.first >= Op::kFinalNorm ? -1 : first.layer;
  label.last_layer = last.first >= Op::kFinalNorm ? -1 : last.layer;
  for (const Step& step : steps) {
    label.predicted_s += step.predicted_s;
    if (step.first >= Op::kFinalNorm && first.first < Op::kFinalNorm)
      continue;  // its rows are sequences or columns
    label.row_begin = std::min(label.row_begin, step.row_begin);
    label.row_end = std::max(label.row_end, step.row_end);
  }
  return label;
}

SegmentShape shape_of(std::span<const Step> steps, int32_t variant) {
  return {.first_op = static_cast<int32_t>(steps.front().first),
          .last_op = static_cast<int32_t>(steps.back().last),
          .first_layer = steps.front().layer,
          .last_layer = steps.back().layer,
          .row_begin = steps.front().row_begin,
          .row_end = steps.back().row_end,
          .variant = variant};
}

std::vector<int32_t> last_rows_of(const Batch& batch) {
  std::vector<int32_t> rows;
  rows.reserve(batch.sequences.size());
  for (const Sequence& s : batch.sequences)
    rows.push_back(s.row_begin + s.rows - 1);
  return rows;
}

// A batch of `rows` rows in `sequences` sequences of nearly equal length.
Batch even_batch(int32_t rows, int32_t sequences, int32_t context) {
  Batch batch;
  batch.tokens.assign(static_cast<size_t>(rows), 0);
  int32_t begin = 0;
  for (int32_t i = 0; i < sequences; ++i) {
    const auto end = static_cast<int32_t>(int64_t{rows} * (i + 1) / sequences);
    batch.sequences.push_back(
        {.row_begin = begin, .rows = end - begin, .context = context, .block_table = {}});
    begin = end;
  }
  return batch;
}

bool overruns(const std::vector<double>& predicted_s, const TransformerPlan& plan,
              const PlanOptions& options) {
  if (options.granularity != Granularity::kBudget)
    return false;
  for (size_t i = 0; i < predicted_s.size(); ++i) {
    const double allowed_s = std::max(plan.planned_s[i], options.budget_s);
    if (predicted_s[i] > PlanBuilder::kMaxOverrun * allowed_s)
      return true;
  }
  return false;
}

}  // namespace

PlanBuilder::PlanBuilder(const ModelConfig& config, int32_t padded_vocab,
                         const LayerKernels& kernels, PlanBuilderOptions options)
    : config_(config),
      padded_vocab_(padded_vocab),
      kernels_(kernels),
      options_(std::move(options)) {}

PlannedBatch PlanBuilder::plan_for(const Batch& batch, const PlanOptions& options) {
  Plan exact = make_plan(config_, batch, options);
  const int32_t bucket = choose_bucket(batch.rows(), options_.buckets);
  if (bucket > 0) {
    auto padded = bucket_plan(assumed_of(batch, bucket), options);
    std::vector<double> predicted_s =
        by_segment(padded->steps, predict_steps(config_, batch, options, padded->steps.steps));
    const double padding_s = total(predicted_s) - total(planned_steps(exact));
    const double launch_s =
        static_cast<double>(padded->num_graph_kernels) * options_.policy.launch_s;
    if (padding_s <= launch_s && !overruns(predicted_s, *padded, options))
      return {std::move(padded), std::move(predicted_s)};
  }
  auto plan = exact_plan(batch, std::move(exact));
  std::vector<double> planned_s = plan->planned_s;
  return {std::move(plan), std::move(planned_s)};
}

std::vector<std::shared_ptr<const TransformerPlan>> PlanBuilder::plans_to_warm(
    int32_t bucket, const PlanOptions& options) {
  std::vector<std::shared_ptr<const TransformerPlan>> plans;
  const int32_t many = std::min(bucket, options_.max_sequences);
  for (const int32_t sequences : {1, many}) {
    if (!plans.empty() && sequences == 1)
      break;
    plans.push_back(bucket_plan({.bucket = bucket,
                                 .sequences = sequences,
                                 .table_stride = table_stride(bucket, options_.block_tokens),
                                 .context = kLeastContext},
                                options));
  }
  return plans;
}

// ---- plans of buckets

int32_t PlanBuilder::table_stride(int32_t tokens, int32_t block_tokens) {
  const int64_t longest = std::max(tokens, kLeastContext);
  return power_of_two((longest + block_tokens - 1) / block_tokens);
}

PlanBuilder::Assumed PlanBuilder::assumed_of(const Batch& batch, int32_t bucket) const {
  int64_t context = 0;
  int32_t longest = 0;
  for (const Sequence& s : batch.sequences) {
    context += s.context;
    longest = std::max(longest, s.context + s.rows);
  }
  context /= static_cast<int64_t>(batch.sequences.size());
  return {.bucket = bucket,
          .sequences = batch.sequences.size() == 1 ? 1 : std::min(bucket, options_.max_sequences),
          .table_stride = table_stride(std::max(longest, bucket), options_.block_tokens),
          .context = std::max(power_of_two(context), kLeastContext)};
}

std::shared_ptr<const TransformerPlan> PlanBuilder::bucket_plan(const Assumed& assumed,
                                                                const PlanOptions& options) {
  const MachineRates& rates = options.rates;
  const std::pair key(assumed,
                      OptionsKey(options.granularity, options.budget_s, options.chunk_tokens,
                                 rates.gemm_flops_per_s, rates.attention_flops_per_s,
                                 rates.weight_bytes_per_s, rates.step_overhead_s));
  const MutexLock lock(mutex_);
  if (const auto known = plans_.find(key); known != plans_.end())
    return known->second;
  Plan steps =
      make_plan(config_, even_batch(assumed.bucket, assumed.sequences, assumed.context), options);
  const PlanSizes sizes{.rows = assumed.bucket,
                        .tile_rows = steps.buffer_rows,
                        .sequences = assumed.sequences,
                        .table_stride = assumed.table_stride};
  if (plans_.size() >= kMaxPlans)
    plans_.clear();  // runs keep theirs; graphs are found again by their shape
  return plans_[key] = build(sizes, std::move(steps), assumed.bucket, {});
}

std::shared_ptr<const TransformerPlan> PlanBuilder::exact_plan(const Batch& batch, Plan steps) {
  const PlanSizes sizes{.rows = batch.rows(),
                        .tile_rows = steps.buffer_rows,
                        .sequences = static_cast<int32_t>(batch.sequences.size()),
                        .table_stride = longest_table(batch, options_.block_tokens)};
  const MutexLock lock(mutex_);
  return build(sizes, std::move(steps), 0, last_rows_of(batch));
}

// Equal numbers: inputs and activations lie alike, so equal segments compute the same.
int32_t PlanBuilder::variant_of(const PlanShape& shape, int32_t bucket) {
  if (bucket == 0)
    return 0;  // never captured
  const auto next = static_cast<int32_t>(variants_.size());
  return variants_.emplace(std::pair(shape.sizes, shape.attention), next).first->second;
}

std::shared_ptr<const TransformerPlan> PlanBuilder::build(const PlanSizes& sizes, Plan steps,
                                                          int32_t bucket,
                                                          const std::vector<int32_t>& last_rows) {
  auto built = std::make_shared<TransformerPlan>();
  built->shape =
      std::make_shared<const PlanShape>(config_, padded_vocab_, sizes, attention_of(steps));
  built->steps = std::move(steps);
  const Plan& plan = built->steps;
  built->planned_s = by_segment(plan, planned_steps(plan));
  const int32_t variant = variant_of(*built->shape, bucket);
  std::vector<CudaSegment> segments;
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    const std::vector<Step> own(plan.steps.begin() + plan.segments[i],
                                plan.steps.begin() + static_cast<ptrdiff_t>(segment_end(plan, i)));
    CudaSegment segment{.label = label_of(own), .shape = shape_of(own, variant)};
    size_t num_kernels = 0;
    for (const Step& step : own) {
      segment.access = joined(segment.access, access_of(*built->shape, step, last_rows));
      num_kernels += LayerKernels::num_kernels(config_, step);
      kernels_.prepare(*built->shape, step);
    }
    segment.is_capturable =
        bucket > 0 && is_worth_graph(num_kernels, built->planned_s[i], options_.policy);
    built->num_graph_kernels += segment.is_capturable ? num_kernels : 0;
    segment.launch = [shape = built->shape, own, &kernels = kernels_](const LaunchArgs& args) {
      for (const Step& step : own)
        kernels.launch(*shape, step, args);
    };
    segments.push_back(std::move(segment));
  }
  const LaneLayout& lane = built->shape->lane;
  const size_t result_end = lane.tokens + static_cast<size_t>(sizes.sequences) * sizeof(int32_t);
  built->plan = std::make_shared<const CudaPlan>(bucket, std::move(segments),
                                                 LiveRange{lane.logits, result_end - lane.logits});
  return built;
}

}  // namespace flowprefill
