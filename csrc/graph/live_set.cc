#include "graph/live_set.h"

#include <algorithm>
#include <utility>

namespace flowprefill {

LiveSet::LiveSet(std::vector<LiveRange> ranges) {
  std::erase_if(ranges, [](const LiveRange& range) { return range.bytes == 0; });
  std::ranges::sort(ranges, {}, &LiveRange::offset);
  for (const LiveRange& range : ranges) {
    if (!ranges_.empty() && range.offset <= ranges_.back().end()) {
      LiveRange& last = ranges_.back();
      last.bytes = std::max(last.end(), range.end()) - last.offset;
    } else {
      ranges_.push_back(range);
    }
  }
}

size_t LiveSet::bytes() const {
  size_t total = 0;
  for (const LiveRange& range : ranges_)
    total += range.bytes;
  return total;
}

LiveSet LiveSet::united(const LiveSet& other) const {
  std::vector<LiveRange> all = ranges_;
  all.insert(all.end(), other.ranges_.begin(), other.ranges_.end());
  return {std::move(all)};
}

LiveSet LiveSet::without(const LiveSet& other) const {
  std::vector<LiveRange> left;
  for (const LiveRange& range : ranges_) {
    size_t begin = range.offset;
    for (const LiveRange& hole : other.ranges_) {
      if (hole.end() <= begin)
        continue;
      if (hole.offset >= range.end())
        break;
      if (hole.offset > begin)
        left.push_back({begin, hole.offset - begin});
      begin = hole.end();
    }
    if (begin < range.end())
      left.push_back({begin, range.end() - begin});
  }
  return {std::move(left)};
}

std::vector<LiveSet> live_sets(std::span<const SegmentAccess> segments, const LiveSet& result) {
  std::vector<LiveSet> live(segments.size() + 1);
  live.back() = result;
  for (size_t i = segments.size(); i-- > 0;)
    live[i] = live[i + 1].without(segments[i].writes).united(segments[i].reads);
  return live;
}

}  // namespace flowprefill
