#include "fake_cudart.h"

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <utility>

namespace {

struct Op {
  std::function<void()> work;      // without the lock
  std::function<void()> finished;  // with it; also if the device broke
  int64_t cost_ns = 0;
};

struct EventState {
  bool is_timed = true;
  bool is_recorded = false;
  bool is_captured = false;
  bool is_done = true;
  uint64_t generation = 0;
  int64_t time_ns = 0;
};

enum class Capturing { kNone, kYes, kInvalid };

struct DeviceBlock {
  size_t bytes = 0;
  cudaMemPool_t pool = nullptr;
};

}  // namespace

struct CUevent_st {
  std::shared_ptr<EventState> state;
};

struct CUgraph_st {
  std::vector<Op> nodes;
};

struct CUgraphExec_st {
  std::shared_ptr<const std::vector<Op>> nodes;
};

struct CUmemPoolHandle_st {
  int num_blocks = 0;
};

struct CUstream_st {
  std::thread worker;
  std::deque<Op> queue;
  bool is_busy = false;
  bool is_closing = false;
  Capturing capturing = Capturing::kNone;
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
  std::thread::id capture_thread;
  std::vector<Op> captured;
};

namespace fake_cudart {
namespace {

struct Device {
  std::mutex mutex;
  std::condition_variable changed;

  std::vector<Call> calls;
  size_t fail_from = 0;  // 0: nothing; else index + 1 of the first call that fails
  size_t fail_times = 0;
  cudaError_t fail_code = cudaSuccess;
  std::string fail_name;
  size_t fail_name_in = 0;
  size_t num_faults = 0;
  std::string last_fault;

  cudaError_t broken = cudaSuccess;
  int64_t clock_ns = 0;
  int num_waiting = 0;
  size_t total_bytes = size_t{1} << 40;
  int compute_capability = 80;
  size_t used_bytes = 0;
  size_t others_bytes = 0;     // that another process will take
  size_t taken_by_others = 0;  // of used_bytes

  std::set<cudaStream_t> streams;
  std::set<cudaEvent_t> events;
  std::set<cudaGraph_t> graphs;
  std::set<cudaGraphExec_t> execs;
  std::set<cudaMemPool_t> pools;
  std::map<void*, DeviceBlock> blocks;
  std::set<void*> pinned;
};

Device& device() {
  static Device instance;
  return instance;
}

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

using Lock = std::unique_lock<std::mutex>;

cudaError_t result(cudaError_t code) {
  if (code != cudaSuccess)
    last_error = code;
  return code;
}

// Logs the call and returns what it has to fail with, if it has.
cudaError_t enter(const char* name, size_t bytes = 0) {
  Device& d = device();
  d.calls.push_back({name, std::this_thread::get_id(), bytes});
  const size_t n = d.calls.size();
  const bool is_counted = d.fail_from != 0 && n >= d.fail_from && n < d.fail_from + d.fail_times;
  const bool is_named = d.fail_name == name && d.fail_name_in > 0 && --d.fail_name_in == 0;
  if (is_counted || is_named) {
    ++d.num_faults;
    d.last_fault = name;
    return result(d.fail_code);
  }
  return result(d.broken);
}

// For calls that may not be made while a capture is going on that forbids them to this thread.
cudaError_t enter_unsafe(const char* name, size_t bytes = 0) {
  if (const cudaError_t code = enter(name, bytes); code != cudaSuccess)
    return code;
  if (thread_mode == cudaStreamCaptureModeRelaxed)
    return cudaSuccess;
  bool is_forbidden = false;
  for (const cudaStream_t stream : device().streams) {
    if (stream->capturing == Capturing::kNone ||
        stream->capture_mode == cudaStreamCaptureModeRelaxed)
      continue;
    const bool is_own = stream->capture_thread == std::this_thread::get_id();
    const bool is_global = stream->capture_mode == cudaStreamCaptureModeGlobal &&
                           thread_mode == cudaStreamCaptureModeGlobal;
    if (is_own || is_global) {
      stream->capturing = Capturing::kInvalid;
      is_forbidden = true;
    }
  }
  return result(is_forbidden ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
}

void work_off(cudaStream_t stream) {
  Device& d = device();
  Lock lock(d.mutex);
  for (;;) {
    d.changed.wait(lock, [&] { return !stream->queue.empty() || stream->is_closing; });
    if (stream->queue.empty())
      return;
    Op op = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->is_busy = true;
    if (d.broken == cudaSuccess && op.work) {
      lock.unlock();
      op.work();
      op.work = nullptr;  // what it holds is destroyed without the lock
      lock.lock();
    }
    if (d.broken == cudaSuccess)
      d.clock_ns += op.cost_ns;
    if (op.finished)
      op.finished();
    stream->is_busy = false;
    d.changed.notify_all();
  }
}

// Queues it, or adds it to the graph in capture.
cudaError_t submit(cudaStream_t stream, Op op) {
  if (stream == nullptr || !device().streams.contains(stream))
    return result(cudaErrorInvalidResourceHandle);
  switch (stream->capturing) {
    case Capturing::kInvalid:
      return result(cudaErrorStreamCaptureInvalidated);
    case Capturing::kYes:
      stream->captured.push_back(std::move(op));
      return cudaSuccess;
    case Capturing::kNone:
      break;
  }
  stream->queue.push_back(std::move(op));
  device().changed.notify_all();
  return cudaSuccess;
}

void wait(Lock& lock, const std::function<bool()>& is_done) {
  Device& d = device();
  ++d.num_waiting;
  d.changed.notify_all();
  d.changed.wait(lock, is_done);
  --d.num_waiting;
}

bool is_idle(cudaStream_t stream) {
  return stream->queue.empty() && !stream->is_busy;
}

cudaError_t allocate(void** memory, size_t bytes, cudaMemPool_t pool) {
  Device& d = device();
  if (d.used_bytes + bytes > d.total_bytes)
    return result(cudaErrorMemoryAllocation);
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xcd, bytes);
  d.blocks[*memory] = {bytes, pool};
  d.used_bytes += bytes;
  if (pool != nullptr)
    ++pool->num_blocks;
  return cudaSuccess;
}

bool release(void* memory) {
  Device& d = device();
  const auto found = d.blocks.find(memory);
  if (found == d.blocks.end())
    return false;
  d.used_bytes -= found->second.bytes;
  d.blocks.erase(found);
  std::free(memory);
  return true;
}

}  // namespace

std::string Live::text() const {
  const std::pair<const char*, int> parts[] = {{"streams", streams},
                                               {"events", events},
                                               {"graphs", graphs},
                                               {"execs", execs},
                                               {"pools", pools},
                                               {"device blocks", device_blocks},
                                               {"pinned blocks", pinned_blocks}};
  std::string text;
  for (const auto& [name, number] : parts) {
    if (number != 0)
      text += std::to_string(number) + " " + name + " ";
  }
  return text;
}

void reset() {
  Device& d = device();
  const Lock lock(d.mutex);
  d.calls.clear();
  d.fail_from = 0;
  d.fail_name.clear();
  d.num_faults = 0;
  d.last_fault.clear();
  d.broken = cudaSuccess;
  d.clock_ns = 0;
  d.total_bytes = size_t{1} << 40;
  d.compute_capability = 80;
  d.used_bytes -= std::exchange(d.taken_by_others, 0);
  d.others_bytes = 0;
  last_error = cudaSuccess;
}

std::vector<Call> calls() {
  const Lock lock(device().mutex);
  return device().calls;
}

size_t num_calls() {
  const Lock lock(device().mutex);
  return device().calls.size();
}

size_t count(const std::string& name) {
  const Lock lock(device().mutex);
  return static_cast<size_t>(std::ranges::count(device().calls, name, &Call::name));
}

Live live() {
  Device& d = device();
  const Lock lock(d.mutex);
  Live live;
  live.streams = static_cast<int>(d.streams.size());
  live.events = static_cast<int>(d.events.size());
  live.graphs = static_cast<int>(d.graphs.size());
  live.execs = static_cast<int>(d.execs.size());
  live.pools = static_cast<int>(d.pools.size());
  live.device_blocks = static_cast<int>(d.blocks.size());
  live.pinned_blocks = static_cast<int>(d.pinned.size());
  live.device_bytes = d.used_bytes;
  return live;
}

int num_waiting() {
  const Lock lock(device().mutex);
  return device().num_waiting;
}

int64_t clock_ns() {
  const Lock lock(device().mutex);
  return device().clock_ns;
}

cudaError_t launch_kernel(cudaStream_t stream, std::function<void()> work, int64_t cost_ns) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaLaunchKernel"); code != cudaSuccess)
    return code;
  return submit(stream, {.work = std::move(work), .finished = {}, .cost_ns = cost_ns});
}

void break_device(cudaError_t code) {
  const Lock lock(device().mutex);
  device().broken = code;
}

void fail_call(size_t n, cudaError_t code, size_t times) {
  Device& d = device();
  const Lock lock(d.mutex);
  d.fail_from = d.calls.size() + n;
  d.fail_times = times;
  d.fail_code = code;
}

void fail_call_of(const std::string& name, size_t n, cudaError_t code) {
  Device& d = device();
  const Lock lock(d.mutex);
  d.fail_name = name;
  d.fail_name_in = n;
  d.fail_code = code;
}

size_t num_faults() {
  const Lock lock(device().mutex);
  return device().num_faults;
}

std::string last_fault() {
  const Lock lock(device().mutex);
  return device().last_fault;
}

void set_compute_capability(int capability) {
  const Lock lock(device().mutex);
  device().compute_capability = capability;
}

void take_during_next_exec(size_t bytes) {
  const Lock lock(device().mutex);
  device().others_bytes = bytes;
}

void set_device_bytes(size_t bytes) {
  const Lock lock(device().mutex);
  device().total_bytes = bytes;
}

}  // namespace fake_cudart

// ---- the runtime's functions

using namespace fake_cudart;  // NOLINT(google-build-using-namespace)

const char* cudaGetErrorName(cudaError_t code) {
  switch (code) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case cudaErrorIllegalState:
      return "cudaErrorIllegalState";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    case cudaErrorNotReady:
      return "cudaErrorNotReady";
    case cudaErrorCapturedEvent:
      return "cudaErrorCapturedEvent";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureWrongThread:
      return "cudaErrorStreamCaptureWrongThread";
    default:
      return "cudaErrorUnknown";
  }
}

const char* cudaGetErrorString(cudaError_t code) {
  return code == cudaErrorIllegalAddress ? "an illegal memory access was encountered" : "double";
}

cudaError_t cudaGetLastError() {
  return std::exchange(last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  return last_error;
}

cudaError_t cudaSetDevice(int index) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaSetDevice"); code != cudaSuccess)
    return code;
  return result(index == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaGetDeviceProperties"); code != cudaSuccess)
    return code;
  if (index != 0)
    return result(cudaErrorInvalidDevice);
  *properties = {};
  std::strcpy(properties->name, "double");
  properties->major = device().compute_capability / 10;
  properties->minor = device().compute_capability % 10;
  properties->multiProcessorCount = 4;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  const Lock lock(device().mutex);
  *version = CUDART_VERSION;
  return enter("cudaDriverGetVersion");
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  const Lock lock(device().mutex);
  *version = CUDART_VERSION;
  return enter("cudaRuntimeGetVersion");
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaMemGetInfo"); code != cudaSuccess)
    return code;
  *total = device().total_bytes;
  *free = device().total_bytes - std::min(device().total_bytes, device().used_bytes);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaThreadExchangeStreamCaptureMode"); code != cudaSuccess)
    return code;
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

// ---- memory

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter_unsafe("cudaMalloc", bytes); code != cudaSuccess)
    return code;
  return allocate(memory, bytes, nullptr);
}

cudaError_t cudaFree(void* memory) {
  Lock lock(device().mutex);
  const cudaError_t code = enter_unsafe("cudaFree");
  wait(lock, [] { return std::ranges::all_of(device().streams, is_idle); });
  return release(memory) ? code : result(cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter_unsafe("cudaHostAlloc", bytes); code != cudaSuccess)
    return code;
  *memory = std::malloc(bytes);
  std::memset(*memory, 0xab, bytes);
  device().pinned.insert(*memory);
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* memory) {
  const Lock lock(device().mutex);
  const cudaError_t code = enter_unsafe("cudaFreeHost");
  if (device().pinned.erase(memory) == 0)
    return result(cudaErrorInvalidValue);
  std::free(memory);
  return code;
}

cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter_unsafe("cudaMemset", bytes); code != cudaSuccess)
    return code;
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaMemcpyAsync", bytes); code != cudaSuccess)
    return code;
  return submit(stream, {.work = [=] { std::memmove(to, from, bytes); }, .finished = {}});
}

cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                              size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaMemcpy2DAsync", width * height); code != cudaSuccess)
    return code;
  if (width > to_pitch || width > from_pitch)
    return result(cudaErrorInvalidPitchValue);
  const auto copy = [=] {
    for (size_t row = 0; row < height; ++row) {
      std::memmove(static_cast<std::byte*>(to) + row * to_pitch,
                   static_cast<const std::byte*>(from) + row * from_pitch, width);
    }
  };
  return submit(stream, {.work = copy, .finished = {}});
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaMemsetAsync", bytes); code != cudaSuccess)
    return code;
  return submit(stream, {.work = [=] { std::memset(memory, value, bytes); }, .finished = {}});
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaMemPoolCreate"); code != cudaSuccess)
    return code;
  *pool = *device().pools.insert(new CUmemPoolHandle_st).first;
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  const Lock lock(device().mutex);
  return enter("cudaMemPoolSetAttribute");
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t pool) {
  const Lock lock(device().mutex);
  const cudaError_t code = enter("cudaMemPoolDestroy");
  device().pools.erase(pool);
  delete pool;
  return code;
}

cudaError_t cudaMallocFromPoolAsync(void** memory, size_t bytes, cudaMemPool_t pool,
                                    cudaStream_t stream) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaMallocFromPoolAsync", bytes); code != cudaSuccess)
    return code;
  if (stream->capturing != Capturing::kNone)
    return result(cudaErrorStreamCaptureUnsupported);
  return allocate(memory, bytes, pool);
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  const Lock lock(device().mutex);
  const cudaError_t code = enter("cudaFreeAsync");
  if (!device().blocks.contains(memory))
    return result(cudaErrorInvalidValue);
  const cudaError_t submitted =
      submit(stream, {.work = {}, .finished = [memory] { release(memory); }});
  return code != cudaSuccess ? code : submitted;
}

// ---- streams and events

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaStreamCreateWithFlags"); code != cudaSuccess)
    return code;
  *stream = *device().streams.insert(new CUstream_st).first;
  (*stream)->worker = std::thread(work_off, *stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  Lock lock(device().mutex);
  const cudaError_t code = enter("cudaStreamDestroy");
  if (device().streams.erase(stream) == 0)
    return result(cudaErrorInvalidResourceHandle);
  stream->is_closing = true;
  device().changed.notify_all();
  lock.unlock();
  stream->worker.join();
  delete stream;
  return code;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  Lock lock(device().mutex);
  if (const cudaError_t code = enter_unsafe("cudaStreamSynchronize"); code != cudaSuccess)
    return code;
  if (stream->capturing != Capturing::kNone) {
    stream->capturing = Capturing::kInvalid;
    return result(cudaErrorStreamCaptureUnsupported);
  }
  wait(lock, [&] { return is_idle(stream); });
  return result(device().broken);
}

cudaError_t cudaDeviceSynchronize() {
  Lock lock(device().mutex);
  if (const cudaError_t code = enter_unsafe("cudaDeviceSynchronize"); code != cudaSuccess)
    return code;
  wait(lock, [] { return std::ranges::all_of(device().streams, is_idle); });
  return result(device().broken);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaEventCreateWithFlags"); code != cudaSuccess)
    return code;
  *event = *device().events.insert(new CUevent_st{std::make_shared<EventState>()}).first;
  (*event)->state->is_timed = (flags & cudaEventDisableTiming) == 0;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Lock lock(device().mutex);
  const cudaError_t code = enter("cudaEventDestroy");
  if (device().events.erase(event) == 0)
    return result(cudaErrorInvalidResourceHandle);
  delete event;  // its state lives on in the stream
  return code;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaEventRecord"); code != cudaSuccess)
    return code;
  const std::shared_ptr<EventState> state = event->state;
  state->is_recorded = true;
  state->is_captured = stream->capturing != Capturing::kNone;
  state->is_done = false;
  const uint64_t generation = ++state->generation;
  return submit(stream, {.work = {}, .finished = [state, generation] {
                           if (state->generation != generation)
                             return;
                           state->is_done = true;
                           state->time_ns = device().clock_ns;
                         }});
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter_unsafe("cudaEventQuery"); code != cudaSuccess)
    return code;
  if (event->state->is_captured)
    return result(cudaErrorCapturedEvent);
  return result(event->state->is_done ? cudaSuccess : cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  Lock lock(device().mutex);
  if (const cudaError_t code = enter_unsafe("cudaEventSynchronize"); code != cudaSuccess)
    return code;
  if (event->state->is_captured)
    return result(cudaErrorCapturedEvent);
  const std::shared_ptr<EventState> state = event->state;
  wait(lock, [&] { return state->is_done; });
  return result(device().broken);
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaEventElapsedTime"); code != cudaSuccess)
    return code;
  for (const cudaEvent_t event : {start, end}) {
    if (!event->state->is_recorded || !event->state->is_timed || event->state->is_captured)
      return result(cudaErrorInvalidResourceHandle);
    if (!event->state->is_done)
      return result(cudaErrorNotReady);
  }
  *ms = static_cast<float>(end->state->time_ns - start->state->time_ns) * 1e-6f;
  return cudaSuccess;
}

// ---- graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaStreamBeginCapture"); code != cudaSuccess)
    return code;
  if (stream->capturing != Capturing::kNone)
    return result(cudaErrorIllegalState);
  stream->capturing = Capturing::kYes;
  stream->capture_mode = mode;
  stream->capture_thread = std::this_thread::get_id();
  stream->captured.clear();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(device().mutex);
  const cudaError_t code = enter("cudaStreamEndCapture");
  *graph = nullptr;
  if (stream->capturing == Capturing::kNone)
    return result(cudaErrorIllegalState);
  if (stream->capture_mode != cudaStreamCaptureModeRelaxed &&
      stream->capture_thread != std::this_thread::get_id())
    return result(cudaErrorStreamCaptureWrongThread);
  const bool is_valid = std::exchange(stream->capturing, Capturing::kNone) == Capturing::kYes;
  if (code != cudaSuccess)
    return code;
  if (!is_valid)
    return result(cudaErrorStreamCaptureInvalidated);
  *graph = *device().graphs.insert(new CUgraph_st{std::move(stream->captured)}).first;
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaGraphGetNodes"); code != cudaSuccess)
    return code;
  *count = graph->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Lock lock(device().mutex);
  const cudaError_t code = enter("cudaGraphDestroy");
  if (device().graphs.erase(graph) == 0)
    return result(cudaErrorInvalidResourceHandle);
  delete graph;
  return code;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaGraphInstantiate"); code != cudaSuccess)
    return code;
  Device& d = device();
  const size_t bytes = graph->nodes.size() * kBytesPerNode;
  if (d.used_bytes + bytes > d.total_bytes)
    return result(cudaErrorMemoryAllocation);
  const size_t others = std::exchange(d.others_bytes, 0);
  d.taken_by_others += others;
  d.used_bytes += bytes + others;
  *exec = new CUgraphExec_st{std::make_shared<const std::vector<Op>>(graph->nodes)};
  d.execs.insert(*exec);
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  const Lock lock(device().mutex);
  return enter("cudaGraphUpload");
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const Lock lock(device().mutex);
  if (const cudaError_t code = enter("cudaGraphLaunch"); code != cudaSuccess)
    return code;
  if (!device().execs.contains(exec))
    return result(cudaErrorInvalidResourceHandle);
  if (stream->capturing != Capturing::kNone)
    return result(cudaErrorStreamCaptureUnsupported);
  const auto nodes = exec->nodes;
  int64_t cost_ns = 0;
  for (const Op& op : *nodes)
    cost_ns += op.cost_ns;
  return submit(stream, {.work =
                             [nodes] {
                               for (const Op& op : *nodes) {
                                 if (op.work)
                                   op.work();
                               }
                             },
                         .finished = {},
                         .cost_ns = cost_ns});
}

// One in flight goes on: the stream shares its nodes.
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  const Lock lock(device().mutex);
  const cudaError_t code = enter("cudaGraphExecDestroy");
  if (device().execs.erase(exec) == 0)
    return result(cudaErrorInvalidResourceHandle);
  device().used_bytes -= exec->nodes->size() * kBytesPerNode;
  delete exec;
  return code;
}
