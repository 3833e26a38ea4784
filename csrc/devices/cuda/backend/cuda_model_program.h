// CudaModelProgram: one run of a model over one batch on the GPU. Made by CudaBackend, executed by
// the executor on the device of CudaBackend::make_device().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "devices/cuda/backend/plan_builder.h"
#include "devices/cuda/runtime/cuda_program.h"
#include "graph/backend.h"

namespace flowprefill {

// May outlive its backend, not the process's GPU.
class CudaModelProgram final : public ModelProgram {
 public:
  // owner: keeps weights, cache and kernels. inputs: of batch_inputs().
  CudaModelProgram(std::shared_ptr<const void> owner, std::shared_ptr<CudaResources> resources,
                   PlannedBatch planned, const Batch& batch, std::vector<std::byte> inputs,
                   const ProgramOptions& options);

  size_t size() const override { return program_.size(); }
  // Of the batch's rows: none of padding.
  SegmentLabel label(size_t i) const override;
  void execute(size_t i, const ExecutionContext& context) override;
  size_t live_bytes(size_t cursor) const override { return program_.live_bytes(cursor); }

  const float* logits() const override;
  int64_t logits_stride() const override;
  std::span<const int32_t> sampled() const override;
  std::span<const PromptScore> scores() const override;
  std::span<const float> embeddings() const override;
  int32_t num_sequences() const override { return sequences_; }
  int32_t vocab_size() const override { return plan_->shape->graph.vocab_size; }
  // Bytes of a lane that it uses.
  size_t workspace_bytes() const override { return plan_->plan->lane_bytes(); }

  // Kernels that segment i launches: the nodes of its graph.
  size_t num_kernels(size_t i) const { return plan_->plan->segment(i).num_kernels; }

  // The token bucket it is padded to; 0: exact size, no graphs.
  int32_t bucket() const { return plan_->plan->bucket(); }

 private:
  // A tensor of the plan's result that comes to the host.
  struct Fetched {
    int32_t tensor = -1;  // none
    LiveRange range = {};
    size_t offset = 0;  // in the program's result
  };
  struct Results {
    Fetched logits = {};
    Fetched scores = {};
    Fetched embedding = {};
    Fetched sampled = {};
  };

  Results results() const;
  std::vector<LiveRange> fetched() const;
  template <typename T>
  std::span<const T> at(const Fetched& fetched) const {
    const std::byte* from = program_.result().data() + fetched.offset;
    return {reinterpret_cast<const T*>(from), fetched.range.bytes / sizeof(T)};
  }

  const std::shared_ptr<const void> owner_;
  const std::shared_ptr<const BuiltPlan> plan_;
  const std::vector<double> predicted_s_;
  const int32_t rows_;
  const int32_t sequences_;
  const bool fetches_logits_;
  const int64_t fail_at_;
  const Results results_;
  CudaProgram program_;
};

}  // namespace flowprefill
