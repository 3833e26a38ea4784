#include "graph/operator_times.h"

#include <algorithm>
#include <array>
#include <optional>

namespace flowprefill {
namespace {

struct Executed {
  OperatorWork work;
  double predicted_s = 0;
  double ratio = 0;  // measured over predicted time
};

// Which of the fields of OperatorWork takes longest.
size_t kind_of(const OperatorWork& work, const MachineRates& rates) {
  const std::array seconds = {work.product_flops / rates.gemm_flops_per_s,
                              work.weight_bytes / rates.weight_bytes_per_s,
                              work.attention_flops / rates.attention_flops_per_s,
                              work.cache_bytes / rates.cache_bytes_per_s, work.other_s};
  return static_cast<size_t>(std::ranges::max_element(seconds) - seconds.begin());
}

OperatorTime time_of(std::vector<Executed>& segments) {
  const auto middle = segments.begin() + static_cast<ptrdiff_t>(segments.size() / 2);
  std::ranges::nth_element(segments, middle, {}, &Executed::ratio);
  const double median = middle->ratio;
  OperatorTime time{.segments = static_cast<uint32_t>(segments.size())};
  for (const Executed& segment : segments) {
    const double ratio = std::clamp(segment.ratio, median / kMostOfMedian, median * kMostOfMedian);
    time.work += segment.work;
    time.seconds += ratio * segment.predicted_s;
  }
  return time;
}

}  // namespace

std::vector<OperatorTime> operator_times(const Timeline& timeline, const Run& run,
                                         const ModelProgram& program, const MachineRates& rates) {
  std::array<std::vector<Executed>, 5> kinds;
  for (const TimelineRecord& record : timeline.of_run(run.id(), run.accounting().first_start_ns)) {
    const std::optional<OperatorWork> work = program.work(record.segment);
    if (!work)
      return {};
    const double predicted_s = rates.seconds(*work);
    const double seconds = static_cast<double>(record.end_ns - record.start_ns) * 1e-9;
    if (predicted_s > 0 && seconds > 0)
      kinds[kind_of(*work, rates)].push_back({*work, predicted_s, seconds / predicted_s});
  }
  std::vector<OperatorTime> times;
  for (std::vector<Executed>& segments : kinds) {
    if (!segments.empty())
      times.push_back(time_of(segments));
  }
  return times;
}

}  // namespace flowprefill
