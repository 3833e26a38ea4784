// What the segments of a run took, by the kind of work that fills them: what the rates of a machine
// are corrected by. Called by csrc/bindings once a run has ended, never by the executor.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/backend.h"
#include "graph/cost.h"
#include "runtime/run.h"
#include "runtime/timeline.h"

namespace flowprefill {

// Executed segments that are mostly of one kind of work.
struct OperatorTime {
  OperatorWork work = {};
  double seconds = 0;  // that they took, see operator_times()
  uint32_t segments = 0;
};

// A segment counts as no more than so many times the median of its kind, and no less than the
// inverse, by measured over predicted time: a thread that was descheduled is no new speed.
inline constexpr double kMostOfMedian = 3.0;

// At most one of each kind; none where the program does not know its segments' work.
// rates: tell which kind of work fills a segment.
// Thread: any. Cost: see Timeline::of_run(), and 50 ns for each segment of the run.
std::vector<OperatorTime> operator_times(const Timeline& timeline, const Run& run,
                                         const ModelProgram& program, const MachineRates& rates);

}  // namespace flowprefill
