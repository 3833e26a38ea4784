// LiveSet: ranges of bytes of a lane, and which of them a run needs at each boundary. Used by
// CudaPlan (made once per plan) and LanePool (what a spill copies).
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace flowprefill {

// Bytes [offset, offset + bytes) of a lane's activations.
struct LiveRange {
  size_t offset = 0;
  size_t bytes = 0;

  size_t end() const { return offset + bytes; }
  friend bool operator==(const LiveRange&, const LiveRange&) = default;
};

// Sorted, without overlap, neighbours joined: each byte is in it once.
class LiveSet {
 public:
  LiveSet() = default;
  LiveSet(std::vector<LiveRange>
              ranges);  // NOLINT(google-explicit-constructor): any order, may overlap

  const std::vector<LiveRange>& ranges() const { return ranges_; }
  size_t bytes() const;
  size_t end() const { return ranges_.empty() ? 0 : ranges_.back().end(); }

  LiveSet united(const LiveSet& other) const;
  LiveSet without(const LiveSet& other) const;
  friend bool operator==(const LiveSet&, const LiveSet&) = default;

 private:
  std::vector<LiveRange> ranges_;
};

// What one segment does to the lane.
struct SegmentAccess {
  LiveSet reads = {};   // needs from before
  LiveSet writes = {};  // overwrites completely
};

// live[i]: what must be kept at the boundary before segment i; live[size]: `result`.
// live[i] = reads[i] + (live[i + 1] - writes[i]). Bytes written in part must be listed as read too.
std::vector<LiveSet> live_sets(std::span<const SegmentAccess> segments, const LiveSet& result);

}  // namespace flowprefill
