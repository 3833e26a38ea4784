// GraphCache: the executables of all (segment shape, token bucket, lane), captured when first
// wanted or ahead of time, within a budget of memory. Called by CudaProgram on the executor's
// thread.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <unordered_map>
#include <vector>

#include "devices/cuda/runtime/graph.h"
#include "devices/cuda/runtime/stream.h"
#include "runtime/thread_annotations.h"

namespace flowprefill {

// What a segment computes. The numbers are the caller's: equal shape and bucket on the same lane
// must record kernels that compute the same from the same bytes.
struct SegmentShape {
  int32_t first_op = 0;  // index into the model's operators
  int32_t last_op = 0;
  int32_t row_begin = 0;
  int32_t row_end = 0;
  int32_t part_begin = 0;  // of the first operator
  int32_t part_end = 0;    // of the last
  int32_t variant = 0;     // what else the arguments depend on: where inputs and activations lie
  friend auto operator<=>(const SegmentShape&, const SegmentShape&) = default;
};

struct GraphKey {
  SegmentShape shape = {};
  int32_t bucket = 0;
  int32_t lane = 0;  // a graph holds addresses, so each lane has its own
  friend auto operator<=>(const GraphKey&, const GraphKey&) = default;
};

struct GraphKeyHash {
  size_t operator()(const GraphKey& key) const noexcept;
};

enum class CaptureFailure : uint8_t {
  kEager,  // the segment is launched eagerly, now and later; the report tells
  kThrow,  // the run that wanted it fails
};

struct GraphCacheOptions {
  size_t max_bytes = size_t{2} << 30;  // device memory of executables, as measured
  size_t max_executables = 4096;
  // Calls after which a segment without an executable is as one that was never asked for: plans
  // that come and go would else leave entries without end.
  size_t max_remembered = 8192;
  // Eager launches of a segment before it is captured: loading a kernel or letting a library
  // allocate is not allowed inside a capture, and the first launch does both.
  int32_t eager_launches = 1;
  CaptureFailure on_failure = CaptureFailure::kEager;
};

struct GraphReport {
  size_t num_executables = 0;
  size_t bytes = 0;      // of these
  double capture_s = 0;  // time spent capturing and instantiating, all of it
  uint64_t num_captured = 0;
  uint64_t num_replayed = 0;
  uint64_t num_evicted = 0;
  uint64_t num_no_room = 0;  // launched eagerly since all room was taken by segments in use
  uint64_t num_failed = 0;   // captures that failed
  std::string last_failure;  // why; empty: none failed
};

// The executable least recently used makes room, but only for a segment asked for a second time
// since that use: else a program with more segments than fit would evict each just before its next
// use, and pay a capture at every boundary. So what fits is replayed and the rest goes eagerly.
//
// Memory: graphs hold no allocations of their own. All of them use the lanes and one scratch area
// that LanePool made once, as large as the largest segment wants.
//
// Thread: the executor's, or before it has started the one that warms; report() from any.
class GraphCache {
 public:
  using Record = std::function<void(cudaStream_t)>;
  struct Request {
    GraphKey key;
    Record record;  // must be safe on zeroed inputs: it is run as often as eager_launches says
    CallContext context;
  };

  explicit GraphCache(GraphCacheOptions options);  // throws CudaError

  // The executable, captured now if it is time; null: launch the segment eagerly. Valid until the
  // next call. Throws only with CaptureFailure::kThrow. Cost: a hit is one look-up; a capture
  // milliseconds.
  const GraphExec* get(const GraphKey& key, const Record& record, const CallContext& context);

  // Captures all that fit, largest bucket first: whatever libraries allocate by size is then
  // allocated once, and what does not fit is the small end. Blocks. Throws what an eager launch
  // throws, and as get().
  GraphReport warm(std::vector<Request> requests);

  GraphReport report() const;

 private:
  struct Entry {
    GraphExec exec;
    size_t bytes = 0;  // measured; kept after eviction, to know before the next capture
    uint64_t last_request = 0;
    int32_t num_eager = 0;
    bool is_refused = false;  // its capture failed
  };

  void forget_old();
  bool make_room(size_t bytes, uint64_t previous_request);
  void capture_into(Entry& entry, const Record& record, const CallContext& context,
                    uint64_t previous_request);
  void note_failure(Entry& entry, const std::string& message);

  const GraphCacheOptions options_;
  const Stream stream_;  // for captures alone: nothing is ever launched there
  std::unordered_map<GraphKey, Entry, GraphKeyHash> entries_;
  uint64_t tick_ = 0;
  mutable Mutex mutex_;
  GraphReport report_ FP_GUARDED_BY(mutex_);
};

}  // namespace flowprefill
