// Which token buckets there are, which one a run is padded to, and which segments are worth a
// graph. Called by PlanBuilder, and by checked(CudaBackendOptions).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace flowprefill {

// Beyond this the padding costs more than the launches that a graph saves.
inline constexpr double kMaxPadding = 2.0;

// Rows of the largest decode step whose buckets are narrow: see default_buckets().
inline constexpr int32_t kDecodeRows = 256;

// Buckets up to max_tokens, ascending. Of n rows padding adds less than
//   n     up to 16:            powers of two
//   n / 2 up to 64:            and half-way between. Weights are read once per step: rows cost
//   little n / 4 up to kDecodeRows:   and quarters. A decode step that pads more would cost more
//   time than
//                              its graph saves, and be launched kernel by kernel
//   n / 2 beyond:              and half-way between. Such prefills hide their launches anyway
// So decode steps have 17 graphs a lane and length of block tables.
std::vector<int32_t> default_buckets(int32_t max_tokens);

// The smallest bucket that holds `tokens`, or 0 (run eagerly, at the exact size) if there is none
// or the padded size were more than `max_padding` times the tokens. Buckets ascend. Throws
// std::invalid_argument for tokens < 1, for buckets that do not ascend and for max_padding < 1.
int32_t choose_bucket(int32_t tokens, std::span<const int32_t> buckets,
                      double max_padding = kMaxPadding);

// What the choice between graph and eager depends on.
struct GraphPolicy {
  double launch_s = 4e-6;           // the host's time to launch one kernel
  double max_launch_share = 0.125;  // of the segment's time on the device
};

// Whether a segment should be a graph: if launching its kernels one by one takes more than a small
// share of the time they run. Else the host, which is ahead, loses nothing by it, and an executable
// would cost memory only. So short prompts and decode steps replay graphs, and long prompts, whose
// kernels take milliseconds, do without: that is what keeps the number of executables small.
bool is_worth_graph(size_t num_kernels, double predicted_s, const GraphPolicy& policy = {});

}  // namespace flowprefill
