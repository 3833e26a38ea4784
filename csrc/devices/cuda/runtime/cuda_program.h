// CudaProgram: one run of a CudaPlan: takes a lane, replays or launches the segments, fetches the
// result. Made by the engine through the bindings, executed by the executor through CudaDevice.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "devices/cuda/runtime/cuda_plan.h"
#include "devices/cuda/runtime/cuda_resources.h"
#include "runtime/segment.h"

namespace flowprefill {

class CudaProgram final : public Program {
 public:
  // tokens: of this run; at most the plan's bucket if it has one. inputs: copied to
  // LaunchArgs::inputs before the first segment, padding included. Throws std::invalid_argument
  // naming what does not fit the lanes or the bucket, CudaError if no pinned memory for the result
  // can be had. fetched: the ranges of the plan's result that result() returns; empty: all of it.
  CudaProgram(std::shared_ptr<CudaResources> resources, std::shared_ptr<const CudaPlan> plan,
              int32_t tokens, std::vector<std::byte> inputs, std::vector<LiveRange> fetched = {});

  size_t size() const override { return plan_->size(); }
  SegmentLabel label(size_t i) const override { return plan_->segment(i).label; }
  // Launches segment i on the stream of the resources; does not wait for it.
  void execute(size_t i, const ExecutionContext& context) override;
  size_t live_bytes(size_t cursor) const override { return plan_->live(cursor).bytes(); }

  // The fetched ranges one after another, once the run has finished; undefined before.
  std::span<const std::byte> result() const { return {result_.get(), result_bytes_}; }

 private:
  void launch(size_t i, const LaneView& lane, const CallContext& context);
  void fetch_result(const LaneView& lane, const CallContext& context);

  const std::shared_ptr<CudaResources> resources_;
  const std::shared_ptr<const CudaPlan> plan_;
  const int32_t tokens_;
  const std::vector<std::byte> inputs_;
  const std::vector<LiveRange> fetched_;
  const size_t result_bytes_;
  const PinnedBlock result_;
  Tenant tenant_;  // last: ends first
};

// The requests that GraphCache::warm() needs to capture all capturable segments of the plan in
// every lane.
std::vector<GraphCache::Request> capture_requests(CudaResources& resources,
                                                  const std::shared_ptr<const CudaPlan>& plan);

}  // namespace flowprefill
