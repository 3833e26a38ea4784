#include "devices/cuda/runtime/graph_cache.h"

#include <algorithm>
#include <chrono>
#include <tuple>
#include <utility>

namespace flowprefill {

namespace {

// Least that is counted for a node: the measured difference of free memory is zero while the driver
// still has room in what it took before.
constexpr size_t kMinBytesPerNode = 4096;
// Most that is counted: of free memory, which is the whole GPU's, other processes may take
// gigabytes meanwhile, and no budget would have room for such a graph ever again. A driver takes
// whole pages of 2 MiB.
constexpr size_t kMaxBytesPerNode = size_t{256} << 10;
constexpr size_t kPageBytes = size_t{4} << 20;

// What a graph of so many nodes took, by free memory before and after.
size_t measured_bytes(size_t num_nodes, size_t before, size_t after) {
  const size_t nodes = std::max<size_t>(1, num_nodes);
  return std::clamp(before - std::min(before, after), nodes * kMinBytesPerNode,
                    nodes * kMaxBytesPerNode + kPageBytes);
}

size_t free_bytes(const CallContext& context) {
  size_t free = 0;
  size_t total = 0;
  FP_CUDA(cudaMemGetInfo(&free, &total), context);
  return free;
}

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace

size_t GraphKeyHash::operator()(const GraphKey& key) const noexcept {
  uint64_t hash = 0xcbf29ce484222325;
  for (const int32_t part :
       {key.shape.first_op, key.shape.last_op, key.shape.row_begin, key.shape.row_end,
        key.shape.part_begin, key.shape.part_end, key.shape.variant, key.bucket, key.lane}) {
    hash = (hash ^ static_cast<uint32_t>(part)) * 0x100000001b3;
    hash ^= hash >> 29;
  }
  return hash;
}

GraphCache::GraphCache(GraphCacheOptions options) : options_(options), stream_(Stream::make()) {}

const GraphExec* GraphCache::get(const GraphKey& key, const Record& record,
                                 const CallContext& context) {
  if (entries_.size() > options_.max_executables + 2 * options_.max_remembered)
    forget_old();
  Entry& entry = entries_[key];
  const uint64_t previous_request = std::exchange(entry.last_request, ++tick_);
  if (!entry.exec) {
    if (entry.is_refused)
      return nullptr;
    if (entry.num_eager < options_.eager_launches) {
      ++entry.num_eager;
      return nullptr;
    }
    capture_into(entry, record, context, previous_request);
    if (!entry.exec)
      return nullptr;
  }
  const MutexLock lock(mutex_);
  ++report_.num_replayed;
  return &entry.exec;
}

// Leaves the entries with an executable, and of the others one a call that is remembered at most.
void GraphCache::forget_old() {
  const uint64_t before = tick_ - std::min<uint64_t>(tick_, options_.max_remembered);
  std::erase_if(entries_, [before](const auto& each) {
    return !each.second.exec && each.second.last_request <= before;
  });
}

// Evicts until `bytes` more fit; false, and nothing evicted, if that cannot be had.
bool GraphCache::make_room(size_t bytes, uint64_t previous_request) {
  std::vector<Entry*> victims;
  for (auto& [key, entry] : entries_) {
    if (entry.exec && entry.last_request < previous_request)
      victims.push_back(&entry);
  }
  std::ranges::sort(victims, {}, &Entry::last_request);
  const MutexLock lock(mutex_);
  size_t num_left = report_.num_executables;
  size_t bytes_left = report_.bytes;
  size_t num_evicted = 0;
  const auto fits = [&] {
    return num_left < options_.max_executables && bytes_left + bytes <= options_.max_bytes;
  };
  while (!fits() && num_evicted < victims.size()) {
    --num_left;
    bytes_left -= victims[num_evicted++]->bytes;
  }
  if (!fits()) {
    ++report_.num_no_room;
    return false;
  }
  // One in flight is freed by CUDA when it has completed.
  for (size_t i = 0; i < num_evicted; ++i)
    victims[i]->exec = GraphExec();
  report_.num_executables = num_left;
  report_.bytes = bytes_left;
  report_.num_evicted += num_evicted;
  return true;
}

// Captures, makes room for what the graph will need, instantiates. Leaves entry.exec empty if there
// is no room or it failed.
void GraphCache::capture_into(Entry& entry, const Record& record, const CallContext& context,
                              uint64_t previous_request) {
  if (!make_room(std::max(entry.bytes, kMinBytesPerNode), previous_request))
    return;
  const Stopwatch stopwatch;
  try {
    const Graph graph = capture(stream_.get(), record, context);
    const size_t before = free_bytes(context);
    GraphExec exec(graph, stream_.get(), context);
    stream_.synchronize(context);  // the upload: this stream has nothing else
    entry.bytes = measured_bytes(graph.num_nodes(context), before, free_bytes(context));
    if (make_room(entry.bytes, previous_request)) {
      entry.exec = std::move(exec);
      const MutexLock lock(mutex_);
      ++report_.num_executables;
      ++report_.num_captured;
      report_.bytes += entry.bytes;
    }
  } catch (const CudaError& error) {
    note_failure(entry, error.charged_to(context).what());
    if (options_.on_failure == CaptureFailure::kThrow)
      throw;
  } catch (const std::exception& error) {
    note_failure(entry, error.what());
    if (options_.on_failure == CaptureFailure::kThrow)
      throw;
  }
  const MutexLock lock(mutex_);
  report_.capture_s += stopwatch.seconds();
}

void GraphCache::note_failure(Entry& entry, const std::string& message) {
  entry.is_refused = true;
  const MutexLock lock(mutex_);
  ++report_.num_failed;
  report_.last_failure = message;
}

GraphReport GraphCache::warm(std::vector<Request> requests) {
  std::ranges::sort(requests, {}, [](const Request& request) {
    return std::tuple(-request.key.bucket, request.key.lane, request.key.shape);
  });
  for (const Request& request : requests) {
    while (entries_[request.key].num_eager < options_.eager_launches) {
      ++entries_[request.key].num_eager;
      request.record(stream_.get());
      stream_.synchronize(request.context);
    }
    Entry& entry = entries_[request.key];
    if (!entry.exec && !entry.is_refused)
      capture_into(entry, request.record, request.context, 0);
  }
  return report();
}

GraphReport GraphCache::report() const {
  const MutexLock lock(mutex_);
  return report_;
}

}  // namespace flowprefill
