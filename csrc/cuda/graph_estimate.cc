#include "cuda/graph_estimate.h"

#include <unordered_set>

namespace flowprefill {

GraphEstimate estimate_graphs(std::span<const SegmentEstimate> segments, const GraphCosts& costs) {
  GraphEstimate estimate;
  std::unordered_set<GraphKey, GraphKeyHash> seen;
  const auto lanes = static_cast<size_t>(costs.num_lanes);
  for (const SegmentEstimate& segment : segments) {
    ++estimate.num_segments;
    if (!segment.is_capturable ||
        !is_worth_graph(segment.num_kernels, segment.predicted_s, costs.policy)) {
      ++estimate.num_eager;
      continue;
    }
    if (!seen.insert({.shape = segment.shape, .bucket = segment.bucket}).second)
      continue;
    estimate.num_executables += lanes;
    estimate.num_kernels += lanes * segment.num_kernels;
  }
  estimate.bytes = estimate.num_kernels * costs.bytes_per_kernel;
  estimate.capture_s = static_cast<double>(estimate.num_kernels) * costs.capture_s_per_kernel;
  return estimate;
}

}  // namespace flowprefill
