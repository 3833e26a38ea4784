#include "devices/cuda/runtime/cuda_plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace flowprefill {

CudaPlan::CudaPlan(int32_t bucket, std::vector<CudaSegment> segments, LiveRange result)
    : bucket_(bucket), segments_(std::move(segments)), result_(result) {
  if (bucket < 0)
    throw std::invalid_argument("bucket: got " + std::to_string(bucket) + ", expected 0 or more");
  if (segments_.empty())
    throw std::invalid_argument("segments: got none");
  std::vector<SegmentAccess> access;
  access.reserve(segments_.size());
  lane_bytes_ = result.end();
  for (size_t i = 0; i < segments_.size(); ++i) {
    if (!segments_[i].launch)
      throw std::invalid_argument("segment " + std::to_string(i) + ": launch: got none");
    access.push_back(segments_[i].access);
    lane_bytes_ = std::max({lane_bytes_, access.back().reads.end(), access.back().writes.end()});
  }
  live_ = live_sets(access, LiveSet({result}));
  if (live_.front().bytes() > 0) {
    throw std::invalid_argument("segments: " + std::to_string(live_.front().bytes()) +
                                " bytes from offset " +
                                std::to_string(live_.front().ranges().front().offset) +
                                " of the lane are read before any segment writes them");
  }
}

}  // namespace flowprefill
