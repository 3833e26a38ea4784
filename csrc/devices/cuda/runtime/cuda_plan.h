// CudaPlan: the segments of all runs of one bucket: how each is launched, what it reads and writes.
// Made by the builder of programs, which brings the kernels; shared by the runs; executed by
// CudaProgram.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "devices/cuda/runtime/graph_cache.h"
#include "graph/live_set.h"
#include "runtime/segment.h"

namespace flowprefill {

// What a segment is launched with.
struct LaunchArgs {
  cudaStream_t stream = nullptr;
  std::byte* activations = nullptr;  // device: the lane's
  std::byte* inputs = nullptr;       // device: this run's inputs, as CudaProgram got them
  std::byte* scratch = nullptr;      // device: free for use, undefined at the start of each segment
  int32_t tokens = 0;  // rows to compute: the bucket, or the run's own in an eager plan
  // The run's inputs on the host. Empty for a segment that may be captured: what it reads here
  // would be frozen into the graph and replayed for other runs.
  std::span<const std::byte> host_inputs = {};
};

struct CudaSegment {
  SegmentLabel label = {};
  SegmentShape shape = {};
  SegmentAccess access = {};  // bytes of the lane
  size_t num_kernels = 0;     // that `launch` launches, as the builder counts
  // Whether it may be a graph; false: launched eagerly each time. Decided by the builder: see
  // bucket.h.
  bool is_capturable = true;
  // Launches the kernels of the segment. Called on the executor's thread, in capture or not; must
  // not wait for the device; may throw, CudaError if CUDA refused. Must be safe to call for several
  // runs one after another, so it holds no state of a run.
  std::function<void(const LaunchArgs&)> launch = {};
};

class CudaPlan {
 public:
  // bucket: tokens that all segments are made for; 0: made for one size, never captured.
  // result: range of the lane that CudaProgram::result() is a copy of.
  // Throws std::invalid_argument without segments, for one without launch, and for one that reads
  // bytes that no segment wrote before.
  CudaPlan(int32_t bucket, std::vector<CudaSegment> segments, LiveRange result);

  int32_t bucket() const { return bucket_; }
  size_t size() const { return segments_.size(); }
  const CudaSegment& segment(size_t i) const { return segments_[i]; }
  const LiveRange& result() const { return result_; }
  // What a run suspended before segment `cursor` needs of its lane; inputs are not in it.
  const LiveSet& live(size_t cursor) const { return live_[cursor]; }
  // Bytes of a lane it needs.
  size_t lane_bytes() const { return lane_bytes_; }

 private:
  const int32_t bucket_;
  const std::vector<CudaSegment> segments_;
  const LiveRange result_;
  std::vector<LiveSet> live_;  // [size + 1]
  size_t lane_bytes_ = 0;
};

}  // namespace flowprefill
