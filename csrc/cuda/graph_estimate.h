// How many executables a set of plans needs and what they cost, before any GPU is touched. Called
// by the start-up report and by the table of tests/cpp/cuda.
#pragma once

#include <cstddef>
#include <span>

#include "cuda/bucket.h"
#include "cuda/graph_cache.h"

namespace flowprefill {

// One segment of one plan.
struct SegmentEstimate {
  SegmentShape shape = {};
  int32_t bucket = 0;
  size_t num_kernels = 0;
  double predicted_s = 0;
  bool is_capturable = true;
};

struct GraphCosts {
  int32_t num_lanes = 2;
  // Others report 24 to 40 MiB for each captured size of a whole model of some 400 kernels.
  size_t bytes_per_kernel = 80 << 10;
  // To capture, instantiate and upload one kernel; the order of magnitude others report.
  double capture_s_per_kernel = 50e-6;
  GraphPolicy policy = {};
};

struct GraphEstimate {
  size_t num_segments = 0;     // given
  size_t num_eager = 0;        // of these: not capturable, or not worth a graph
  size_t num_executables = 0;  // different ones, times lanes
  size_t num_kernels = 0;      // in them
  size_t bytes = 0;
  double capture_s = 0;
};

GraphEstimate estimate_graphs(std::span<const SegmentEstimate> segments,
                              const GraphCosts& costs = {});

}  // namespace flowprefill
