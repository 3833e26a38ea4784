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

double total(const std::vector<double>& seconds) {
  return std::accumulate(seconds.begin(), seconds.end(), 0.0);
}

double planned_total(const Plan& plan) {
  double seconds = 0;
  for (const Step& step : plan.steps)
    seconds += step.predicted_s;
  return seconds;
}

std::vector<AttentionRows> attention_of(const ModelGraph& graph, const Plan& plan,
                                        const AttentionRules& rules, int32_t table_stride) {
  std::vector<AttentionRows> rows;
  for (const Step& step : plan.steps) {
    for (int32_t i = step.first; i <= step.last; ++i) {
      if (graph.op(i).kind == OperatorKind::kAttention)
        rows.push_back(rules.rows_of(step, graph.op(i), table_stride));
    }
  }
  std::ranges::sort(rows);
  rows.erase(std::ranges::unique(rows).begin(), rows.end());
  return rows;
}

// Whether attention of some KV heads only is among the steps. It takes about as long as a segment
// may, so a graph saves nothing; and the shape of several such steps does not say where their rows
// end, so another plan's might be taken for it.
bool cuts_heads(const ModelGraph& graph, std::span<const Step> steps) {
  return std::ranges::any_of(steps, [&graph](const Step& step) {
    return !step.is_whole() && graph.op(step.first).kind == OperatorKind::kAttention;
  });
}

SegmentShape shape_of(std::span<const Step> steps, int32_t variant) {
  return {.first_op = steps.front().first,
          .last_op = steps.back().last,
          .row_begin = steps.front().row_begin,
          .row_end = steps.back().row_end,
          .part_begin = steps.front().part_begin,
          .part_end = steps.back().part_end,
          .variant = variant};
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

// Where the planner cut as finely as it could, a segment may take what was planned for it.
bool overruns(const std::vector<double>& predicted_s, const BuiltPlan& plan, bool is_whole,
              const PlanOptions& options) {
  if (options.granularity != Granularity::kBudget)
    return false;
  for (size_t i = 0; i < predicted_s.size(); ++i) {
    const double planned_s = is_whole ? 0.0 : plan.planned_s[i];
    const double allowed_s = std::max(planned_s, options.budget_s);
    if (predicted_s[i] > PlanBuilder::kMaxOverrun * allowed_s)
      return true;
  }
  return false;
}

}  // namespace

PlanBuilder::PlanBuilder(std::shared_ptr<const ModelGraph> graph, const OperatorKernels& kernels,
                         PlanBuilderOptions options)
    : graph_(std::move(graph)), kernels_(kernels), options_(std::move(options)) {}

PlannedBatch PlanBuilder::plan_for(const Batch& batch, const PlanOptions& options) {
  Plan exact = make_plan(*graph_, batch, options, options_.cuts);
  const int32_t bucket = choose_bucket(batch.rows(), options_.buckets);
  if (bucket > 0) {
    const bool fits_budget = options.granularity == Granularity::kBudget && exact.size() == 1;
    for (const bool is_whole : {true, false}) {
      if (is_whole && !fits_budget)
        continue;
      if (auto found = padded(batch, bucket, is_whole, options, planned_total(exact)))
        return *std::move(found);
    }
  }
  auto plan = exact_plan(batch, std::move(exact));
  std::vector<double> planned_s = plan->planned_s;
  return {std::move(plan), std::move(planned_s)};
}

std::optional<PlannedBatch> PlanBuilder::padded(const Batch& batch, int32_t bucket, bool is_whole,
                                                const PlanOptions& options, double exact_s) {
  Assumed assumed = assumed_of(batch, bucket);
  PlanOptions cut = options;
  if (is_whole) {
    cut.granularity = Granularity::kNone;
    assumed.context = kLeastContext;  // decides where to cut, so nothing here
  }
  auto plan = bucket_plan(assumed, cut);
  std::vector<double> predicted_s =
      predict_segments(*graph_, batch, options, options_.cuts, plan->compiled.plan());
  const double padding_s = total(predicted_s) - exact_s;
  const double launch_s = static_cast<double>(plan->num_graph_kernels) * options_.policy.launch_s;
  if (padding_s > launch_s || overruns(predicted_s, *plan, is_whole, options))
    return std::nullopt;
  return PlannedBatch{std::move(plan), std::move(predicted_s)};
}

std::vector<std::shared_ptr<const BuiltPlan>> PlanBuilder::plans_to_warm(
    int32_t bucket, const PlanOptions& options) {
  std::vector<std::shared_ptr<const BuiltPlan>> plans;
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
  return power_of_two(blocks_of(std::max(tokens, kLeastContext), block_tokens));
}

PlanBuilder::Assumed PlanBuilder::assumed_of(const Batch& batch, int32_t bucket) const {
  int64_t context = 0;
  int32_t longest = 0;
  for (const Sequence& s : batch.sequences) {
    context += s.context;
    longest = std::max(longest, s.length());
  }
  const int32_t sequences = batch.num_sequences();
  context /= sequences;
  const int32_t most = sequences <= kPackedSequences ? kPackedSequences : options_.max_sequences;
  return {.bucket = bucket,
          .sequences = sequences == 1 ? 1 : std::min({bucket, most, options_.max_sequences}),
          .table_stride = table_stride(std::max(longest, bucket), options_.block_tokens),
          .context = std::max(power_of_two(context), kLeastContext)};
}

std::shared_ptr<const BuiltPlan> PlanBuilder::bucket_plan(const Assumed& assumed,
                                                          const PlanOptions& options) {
  const auto& [gemm, attention, weight, overhead, cache] = options.rates;  // all that there are
  const std::pair key(assumed,
                      OptionsKey(options.granularity, options.budget_s, options.chunk_tokens, gemm,
                                 attention, weight, overhead, cache));
  const MutexLock lock(mutex_);
  if (const auto known = plans_.find(key); known != plans_.end())
    return known->second;
  Plan plan = make_plan(*graph_, even_batch(assumed.bucket, assumed.sequences, assumed.context),
                        options, options_.cuts);
  const PlanSizes sizes{.rows = assumed.bucket,
                        .tile_rows = plan.tile_rows,
                        .sequences = assumed.sequences,
                        .head_tile_rows = plan.head_tile_rows};
  if (plans_.size() >= kMaxPlans)
    plans_.clear();  // runs keep theirs; graphs are found again by their shape
  return plans_[key] = build(sizes, assumed.table_stride, std::move(plan), assumed.bucket, {});
}

std::shared_ptr<const BuiltPlan> PlanBuilder::exact_plan(const Batch& batch, Plan plan) {
  const PlanSizes sizes{.rows = batch.rows(),
                        .tile_rows = plan.tile_rows,
                        .sequences = batch.num_sequences(),
                        .head_tile_rows = plan.head_tile_rows};
  const MutexLock lock(mutex_);
  return build(sizes, longest_table(batch, options_.block_tokens), std::move(plan), 0,
               last_rows(batch));
}

// Equal numbers: inputs and activations lie alike, and tiles come in the same order, so segments
// that begin and end alike compute the same.
int32_t PlanBuilder::variant_of(const PlanShape& shape, const Plan& plan, int32_t bucket) {
  if (bucket == 0)
    return 0;  // never captured
  constexpr int32_t kOutputs = 4;
  const Shape key(shape.sizes(), shape.inputs.table_stride, shape.attention, plan.chunk_rows);
  if (const auto known = variants_.find(key); known != variants_.end())
    return known->second;
  if (variants_.size() >= options_.max_variants)
    variants_.clear();
  return variants_[key] = num_variants_++ * kOutputs + static_cast<int32_t>(options_.output);
}

std::shared_ptr<const BuiltPlan> PlanBuilder::build(const PlanSizes& sizes, int32_t table_stride,
                                                    Plan plan, int32_t bucket,
                                                    const std::vector<int32_t>& last_rows) {
  const AttentionRules rules(*graph_, options_.multiprocessors, options_.block_tokens,
                             options_.uses_hopper_attention);
  auto shape = std::make_shared<const PlanShape>(*graph_, sizes, table_stride, rules,
                                                 attention_of(*graph_, plan, rules, table_stride));
  auto built = std::make_shared<BuiltPlan>(
      BuiltPlan{.shape = std::move(shape), .compiled = CompiledProgram(graph_, std::move(plan))});
  const int32_t variant = variant_of(*built->shape, built->compiled.plan(), bucket);
  std::vector<CudaSegment> segments;
  segments.reserve(built->compiled.size());
  for (size_t i = 0; i < built->compiled.size(); ++i)
    segments.push_back(segment(*built, i, bucket, variant, last_rows));
  built->plan =
      std::make_shared<const CudaPlan>(bucket, std::move(segments), built->shape->lane.result());
  return built;
}

CudaSegment PlanBuilder::segment(BuiltPlan& built, size_t index, int32_t bucket, int32_t variant,
                                 const std::vector<int32_t>& last_rows) const {
  const std::span<const Step> steps = built.compiled.steps(index);
  CudaSegment segment{.label = built.compiled.label(index), .shape = shape_of(steps, variant)};
  built.planned_s.push_back(segment.label.predicted_s);
  for (const Step& step : steps) {
    segment.access = joined(segment.access, access_of(*graph_, built.shape->lane, step, last_rows));
    kernels_.prepare(*built.shape, step);
    segment.num_kernels += kernels_.num_kernels(*built.shape, step);
  }
  segment.is_capturable =
      bucket > 0 && !cuts_heads(*graph_, steps) &&
      is_worth_graph(segment.num_kernels, segment.label.predicted_s, options_.policy);
  built.num_graph_kernels += segment.is_capturable ? segment.num_kernels : 0;
  segment.launch = [shape = built.shape, own = std::vector(steps.begin(), steps.end()),
                    &kernels = kernels_](const LaunchArgs& args) {
    for (const Step& step : own)
      kernels.launch(*shape, step, args);
  };
  return segment;
}

}  // namespace flowprefill
