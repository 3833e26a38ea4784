// OperatorKernels: launches the operators of a graph's steps, with addresses from the plan's shape.
// Called by the segments that PlanBuilder makes, and to list the products to measure.
#pragma once

#include <optional>

#include "devices/cuda/backend/device_kv_cache.h"
#include "devices/cuda/backend/device_weights.h"
#include "devices/cuda/backend/gemm_selector.h"
#include "devices/cuda/backend/plan_shape.h"
#include "devices/cuda/kernels/attention_args.h"
#include "devices/cuda/kernels/fused_product.h"
#include "devices/cuda/runtime/cuda_plan.h"
#include "graph/cost.h"

namespace flowprefill {

// Thread: any; launches are the executor's.
class OperatorKernels {
 public:
  // The three live as long as this. scratch_bytes: of LaunchArgs::scratch.
  OperatorKernels(const DeviceWeights& weights, const DeviceKvCache& cache,
                  const GemmSelector& gemms, size_t scratch_bytes)
      : weights_(weights), cache_(cache), gemms_(gemms), scratch_bytes_(scratch_bytes) {}

  // Launches the step's operators in order, num_kernels() kernels. Throws CudaError naming operator
  // and layer. Captures and eager launches give the same kernels and arguments.
  void launch(const PlanShape& shape, const Step& step, const LaunchArgs& args) const;

  // Gets the step's products ready, so that launch() asks no library. May take 200 us for a shape
  // of product that is new. Thread: any.
  void prepare(const PlanShape& shape, const Step& step) const;

  // Kernels that launch() launches: one for most operators; of products and attention several.
  // Thread: any.
  size_t num_kernels(const PlanShape& shape, const Step& step) const;

  // The product of the step's first operator over its rows and parts, in a lane that starts at
  // `lane`; nowhere(): to ask by shape alone.
  static GemmArgs product(const PlanShape& shape, const DeviceWeights& weights, const Step& step,
                          std::byte* lane) {
    return product(shape, weights, shape.graph.op(step.first), step, lane);
  }

  // An address that no kernel reads or writes: it is in arguments that are never launched.
  static std::byte* nowhere() { return reinterpret_cast<std::byte*>(uintptr_t{1} << 30); }

 private:
  struct Call;
  // Operators up to `last` as one kernel.
  struct Fused {
    FusedProduct args;
    int32_t last;
  };

  static GemmArgs product(const PlanShape& shape, const DeviceWeights& weights, const Operator& op,
                          const Step& step, std::byte* lane);
  size_t num_kernels(const PlanShape& shape, const Operator& op, const Step& step) const;
  // Those from `index` on that one kernel computes; empty: there are none.
  std::optional<Fused> fused_from(const PlanShape& shape, const Step& step, const LaunchArgs& args,
                                  int32_t index) const;
  void launch(const Call& call) const;
  void embed(const Call& call) const;
  void rotary(const Call& call) const;
  void norm(const Call& call) const;
  template <typename Out>
  void norm_into(const Call& call) const;
  void linear(const Call& call) const;
  void residual(const Call& call) const;
  void round(const Call& call) const;
  NormedRows normed_rows(const Call& call) const;
  void rope(const Call& call) const;
  RopeArgs<Bf16> rope_args(const Call& call) const;
  void attention(const Call& call) const;
  AttentionArgs attention_args(const Call& call) const;
  void sample(const Call& call) const;
  void score(const Call& call) const;
  void pool(const Call& call) const;

  const DeviceWeights& weights_;
  const DeviceKvCache& cache_;
  const GemmSelector& gemms_;
  const size_t scratch_bytes_;
};

}  // namespace flowprefill
