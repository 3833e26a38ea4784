#include "devices/cuda/runtime/cuda_program.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace flowprefill {

namespace {

CallContext context_of(const CudaSegment& segment) {
  return {.op = segment.label.op, .layer = segment.label.layer};
}

bool may_capture(const CudaPlan& plan, const CudaSegment& segment) {
  return plan.bucket() > 0 && segment.is_capturable;
}

LaunchArgs args_of(const LaneView& lane, int32_t tokens) {
  return {.stream = nullptr,
          .activations = lane.activations,
          .inputs = lane.inputs,
          .scratch = lane.scratch,
          .tokens = tokens};
}

// Launches a segment that may be captured, into whichever stream.
auto recorder(const CudaSegment& segment, LaunchArgs args) {
  return [&segment, args](cudaStream_t stream) {
    LaunchArgs on_stream = args;
    on_stream.stream = stream;
    segment.launch(on_stream);
  };
}

std::shared_ptr<const CudaPlan> checked(std::shared_ptr<const CudaPlan> plan, int32_t tokens,
                                        size_t lane_bytes) {
  if (plan == nullptr)
    throw std::invalid_argument("plan: got none");
  if (tokens < 1 || (plan->bucket() > 0 && tokens > plan->bucket())) {
    throw std::invalid_argument(
        "tokens: got " + std::to_string(tokens) + ", expected at least 1" +
        (plan->bucket() > 0 ? " and at most the bucket, " + std::to_string(plan->bucket()) : ""));
  }
  if (plan->lane_bytes() > lane_bytes) {
    throw std::invalid_argument(
        "plan: needs " + std::to_string(plan->lane_bytes()) +
        " bytes of a lane, expected at most lane_bytes = " + std::to_string(lane_bytes));
  }
  return plan;
}

std::vector<LiveRange> checked(std::vector<LiveRange> fetched, const LiveRange& result) {
  if (fetched.empty())
    fetched.push_back(result);
  for (const LiveRange& range : fetched) {
    if (range.offset < result.offset || range.end() > result.end()) {
      throw std::invalid_argument("fetched: got bytes " + std::to_string(range.offset) + " to " +
                                  std::to_string(range.end()) + " of the lane, expected " +
                                  "a part of the plan's result");
    }
  }
  return fetched;
}

size_t bytes_of(const std::vector<LiveRange>& ranges) {
  size_t bytes = 0;
  for (const LiveRange& range : ranges)
    bytes += range.bytes;
  return bytes;
}

}  // namespace

CudaProgram::CudaProgram(std::shared_ptr<CudaResources> resources,
                         std::shared_ptr<const CudaPlan> plan, int32_t tokens,
                         std::vector<std::byte> inputs, std::vector<LiveRange> fetched)
    : resources_(std::move(resources)),
      plan_(checked(std::move(plan), tokens, resources_->lanes().options().lane_bytes)),
      tokens_(tokens),
      inputs_(std::move(inputs)),
      fetched_(checked(std::move(fetched), plan_->result())),
      result_bytes_(bytes_of(fetched_)),
      result_(resources_->pinned().take(result_bytes_)),
      tenant_(resources_->lanes(), inputs_) {}

void CudaProgram::execute(size_t i, const ExecutionContext&) {
  const CallContext context = context_of(plan_->segment(i));
  const LaneView& lane = resources_->lanes().enter(tenant_, resources_->stream(), context);
  try {
    launch(i, lane, context);
    if (i + 1 == size())
      fetch_result(lane, context);
  } catch (...) {
    resources_->lanes().leave(tenant_);  // the run fails: nothing of it is worth spilling
    throw;
  }
  if (i + 1 == size()) {
    resources_->lanes().leave(tenant_);  // the next tenant comes behind in the stream
  } else {
    tenant_.keep(&plan_->live(i + 1));
  }
}

void CudaProgram::launch(size_t i, const LaneView& lane, const CallContext& context) {
  const CudaSegment& segment = plan_->segment(i);
  LaunchArgs args = args_of(lane, plan_->bucket() > 0 ? plan_->bucket() : tokens_);
  if (may_capture(*plan_, segment)) {
    const GraphKey key{.shape = segment.shape, .bucket = plan_->bucket(), .lane = lane.index};
    const GraphExec* exec = resources_->graphs().get(key, recorder(segment, args), context);
    if (exec != nullptr) {
      exec->launch(resources_->stream(), context);
      return;
    }
  } else {
    args.host_inputs = inputs_;
  }
  args.stream = resources_->stream();
  segment.launch(args);
}

void CudaProgram::fetch_result(const LaneView& lane, const CallContext& context) {
  std::byte* to = result_.get();
  for (const LiveRange& range : fetched_) {
    if (range.bytes == 0)
      continue;
    FP_CUDA(cudaMemcpyAsync(to, lane.activations + range.offset, range.bytes,
                            cudaMemcpyDeviceToHost, resources_->stream()),
            context);
    to += range.bytes;
  }
}

std::vector<GraphCache::Request> capture_requests(CudaResources& resources,
                                                  const std::shared_ptr<const CudaPlan>& plan) {
  std::vector<GraphCache::Request> requests;
  for (const LaneView& lane : resources.lanes().views()) {
    for (size_t i = 0; i < plan->size(); ++i) {
      const CudaSegment& segment = plan->segment(i);
      if (!may_capture(*plan, segment))
        continue;
      requests.push_back(
          {.key = {.shape = segment.shape, .bucket = plan->bucket(), .lane = lane.index},
           .record = [plan, record = recorder(segment, args_of(lane, plan->bucket()))](
                         cudaStream_t stream) { record(stream); },
           .context = context_of(segment)});
    }
  }
  return requests;
}

}  // namespace flowprefill
