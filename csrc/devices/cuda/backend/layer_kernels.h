// LayerKernels: launches the operators of a transformer's steps, with addresses from the plan's
// shape. Called by the segments that PlanBuilder makes, and to list the products to measure.
#pragma once

#include <memory>
#include <vector>

#include "devices/cuda/backend/device_kv_cache.h"
#include "devices/cuda/backend/device_weights.h"
#include "devices/cuda/backend/gemm_selector.h"
#include "devices/cuda/backend/plan_shape.h"
#include "devices/cuda/runtime/cuda_plan.h"
#include "graph/planner.h"

namespace flowprefill {

// Thread: any; launches are the executor's.
class LayerKernels {
 public:
  // The three live as long as this. scratch_bytes: of LaunchArgs::scratch.
  LayerKernels(const ModelConfig& config, const DeviceWeights& weights, const DeviceKvCache& cache,
               const GemmSelector& gemms, size_t scratch_bytes);

  // Launches the step's operators in order. Throws CudaError naming operator and layer. Captures
  // and eager launches give the same kernels and arguments.
  void launch(const PlanShape& shape, const Step& step, const LaunchArgs& args) const;

  // Gets the step's products ready, so that launch() asks no library. May take 200 us for a shape
  // of product that is new. Thread: any.
  void prepare(const PlanShape& shape, const Step& step) const;

  // Kernels that launch() makes of the step.
  static size_t num_kernels(const ModelConfig& config, const Step& step);

  // The product of one operator (kQkv, kOutput, kGateUp, kDown, kHead) over the step's rows, in a
  // lane that starts at `lane`.
  static GemmArgs product(const PlanShape& shape, const DeviceWeights& weights, Op op,
                          const Step& step, std::byte* lane);

 private:
  struct Call;

  void launch(const Call& call, Op op) const;
  void embed(const Call& call) const;
  void norm(const Call& call, const float* weight) const;
  void rope(const Call& call) const;
  void attention(const Call& call) const;
  void multiply(const Call& call, Op op) const;
  void final_norm(const Call& call) const;
  void choose_tokens(const Call& call) const;

  const ModelConfig& c_;
  const DeviceWeights& weights_;
  const DeviceKvCache& cache_;
  const GemmSelector& gemms_;
  const size_t scratch_bytes_;
};

}  // namespace flowprefill
