// PlanBuilder: makes and keeps the CudaPlans of a model, and decides between a bucket's plan, whose
// segments can be graphs, and one of exactly the batch's size. Called by CudaBackend.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "devices/cuda/backend/operator_kernels.h"
#include "devices/cuda/backend/plan_shape.h"
#include "devices/cuda/runtime/bucket.h"
#include "devices/cuda/runtime/cuda_plan.h"
#include "graph/batch.h"
#include "graph/compiled_program.h"
#include "graph/graph_variants.h"
#include "graph/planner.h"
#include "runtime/thread_annotations.h"

namespace flowprefill {

// A CudaPlan and what it was made from.
struct BuiltPlan {
  std::shared_ptr<const PlanShape> shape;
  CompiledProgram compiled;
  std::vector<double> planned_s = {};  // of each segment
  size_t num_graph_kernels = 0;        // in segments that may be graphs
  std::shared_ptr<const CudaPlan> plan = {};
};

// What a run gets.
struct PlannedBatch {
  std::shared_ptr<const BuiltPlan> plan;
  std::vector<double> predicted_s;  // of each segment, for this batch
};

struct PlanBuilderOptions {
  std::vector<int32_t> buckets = {};  // ascending; empty: every plan is of exact size
  int32_t max_sequences = 0;
  int32_t block_tokens = 0;
  int32_t multiprocessors = 0;
  bool uses_hopper_attention = false;
  CutRules cuts = {};
  GraphPolicy policy = {};
  RunOutput output = RunOutput::kLogits;  // of the graph: those of others share no executables
  // Layouts that are told apart; with more all are forgotten, and what comes again is a new one,
  // whose graphs are captured anew.
  size_t max_variants = 4096;
};

// Which plan a batch gets. That of the smallest bucket with room for it, unless
// - there is none, or its padding is beyond kMaxPadding;
// - the padding is predicted to take longer than launching its captured kernels one by one does;
// - granularity is a budget and a segment is predicted to take more than kMaxOverrun times the
//   budget (or the time planned for it, if that is more): the batch's context is far above what the
//   plan assumes, so its attention has to be cut elsewhere.
// Then it is a plan of exactly its size, launched eagerly, made for this run alone.
//
// A batch that is predicted to take no longer than the budget, as decode steps of a small model do,
// has one segment, whatever contexts the bucket's plan assumes, unless its padding makes it
// overrun. So a decode step is one graph.
//
// A bucket's plan assumes sequences of equal length with the batch's mean context, rounded up to a
// power of two. It is made for one sequence, for up to kPackedSequences or for as many as fit, and
// for block tables of a power of two of blocks, so that few plans serve all batches; plans that
// place inputs and activations alike, and fill them in the same order, share their graphs.
//
// Thread: any.
class PlanBuilder {
 public:
  static constexpr double kMaxOverrun = 1.25;
  // Of a packed prefill: each has a row of logits, computed or not, and decode steps alone have
  // more.
  static constexpr int32_t kPackedSequences = 64;

  // Columns of the block tables that a bucket's plan has for sequences of up to `tokens`.
  static int32_t table_stride(int32_t tokens, int32_t block_tokens);

  // kernels live as long as the plans.
  PlanBuilder(std::shared_ptr<const ModelGraph> graph, const OperatorKernels& kernels,
              PlanBuilderOptions options);

  PlannedBatch plan_for(const Batch& batch, const PlanOptions& options);

  // The plans of a bucket that runs are likely to want first: short contexts, one sequence and a
  // decode step.
  std::vector<std::shared_ptr<const BuiltPlan>> plans_to_warm(int32_t bucket,
                                                              const PlanOptions& options);

 private:
  // What distinguishes the plans of a bucket.
  struct Assumed {
    int32_t bucket = 0;
    int32_t sequences = 0;
    int32_t table_stride = 0;
    int32_t context = 0;  // of each sequence
    auto operator<=>(const Assumed&) const = default;
  };
  using OptionsKey =
      std::tuple<Granularity, double, int32_t, double, double, double, double, double>;
  // Where inputs and activations lie, and in which order plans fill these: sizes, stride of the
  // block tables, rows that attend together, rows of a chunk.
  using Shape = std::tuple<PlanSizes, int32_t, std::vector<AttentionRows>, int32_t>;

  Assumed assumed_of(const Batch& batch, int32_t bucket) const;
  // The bucket's plan for the batch, cut as `options` say or, `is_whole`, not at all; none if that
  // is worse than a plan of exactly its size, which takes exact_s.
  std::optional<PlannedBatch> padded(const Batch& batch, int32_t bucket, bool is_whole,
                                     const PlanOptions& options, double exact_s);
  std::shared_ptr<const BuiltPlan> bucket_plan(const Assumed& assumed, const PlanOptions& options);
  std::shared_ptr<const BuiltPlan> exact_plan(const Batch& batch, Plan plan);
  // bucket 0: of exact size.
  std::shared_ptr<const BuiltPlan> build(const PlanSizes& sizes, int32_t table_stride, Plan plan,
                                         int32_t bucket, const std::vector<int32_t>& last_rows)
      FP_REQUIRES(mutex_);
  CudaSegment segment(BuiltPlan& built, size_t index, int32_t bucket, int32_t variant,
                      const std::vector<int32_t>& last_rows) const;
  int32_t variant_of(const PlanShape& shape, const Plan& plan, int32_t bucket) FP_REQUIRES(mutex_);

  const std::shared_ptr<const ModelGraph> graph_;
  const OperatorKernels& kernels_;
  const PlanBuilderOptions options_;
  Mutex mutex_;
  std::map<std::pair<Assumed, OptionsKey>, std::shared_ptr<const BuiltPlan>> plans_
      FP_GUARDED_BY(mutex_);
  std::map<Shape, int32_t> variants_ FP_GUARDED_BY(mutex_);
  int32_t num_variants_ FP_GUARDED_BY(mutex_) = 0;  // so far: no number is given twice
};

}  // namespace flowprefill
