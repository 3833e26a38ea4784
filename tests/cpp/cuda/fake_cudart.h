// fake_cudart: a double of the CUDA runtime, linked in place of libcudart, and what tests ask of
// it.
//
// It implements the functions that csrc/devices/cuda calls, against the real headers, as the CUDA
// documentation describes them: streams are host threads that do work in order; capture turns work
// into the nodes of a graph and obeys the rules of the capture modes; instantiated graphs are
// launched, events recorded, queried, waited for and timed; memory is the heap's (so
// AddressSanitizer watches it), spills come from pools; every handle is counted. The device's clock
// stands still but for the costs of kernels, so times are exact.
//
// It proves order, bounds, lifetimes and what happens on errors, as modelled. It cannot prove
// anything about kernels, about what libraries (cuBLAS) allow inside a capture, the memory graphs
// take, or times. Also not modelled: capture across streams, allocations as graph nodes, several
// devices, the legacy default stream.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace fake_cudart {

// One call of a CUDA function. Look-ups of error names and cudaGetLastError are not logged.
struct Call {
  std::string name;
  std::thread::id thread;
  size_t bytes = 0;  // of copies and allocations
};

// What exists and has not been destroyed.
struct Live {
  int streams = 0;
  int events = 0;
  int graphs = 0;
  int execs = 0;
  int pools = 0;
  int device_blocks = 0;
  int pinned_blocks = 0;
  size_t device_bytes = 0;

  int handles() const {
    return streams + events + graphs + execs + pools + device_blocks + pinned_blocks;
  }
  std::string text() const;
};

// Forgets log, faults, the device's error, clock and memory size. Handles stay: see live().
void reset();

// ---- looking

std::vector<Call> calls();
size_t num_calls();
size_t count(const std::string& name);
Live live();
// Host threads that sleep in cudaEventSynchronize or cudaStreamSynchronize now.
int num_waiting();
// Device nanoseconds so far: the sum of the costs of everything done.
int64_t clock_ns();

// ---- kernels

// Launches `work` into the stream as a kernel would be, or adds it to the graph in capture. A call
// of CUDA like others: it can be made to fail, and counts as "cudaLaunchKernel". `cost_ns`: time it
// takes.
cudaError_t launch_kernel(cudaStream_t stream, std::function<void()> work, int64_t cost_ns = 1000);

// From a kernel: an error that stays, as an illegal address does. Nothing is executed any more and
// every call returns it, until reset().
void break_device(cudaError_t code);

// ---- faults: the call has no effect and returns `code`; calls that destroy take effect all the
// same

// The n-th to (n + times - 1)-th calls from now on, n counts from 1.
void fail_call(size_t n, cudaError_t code, size_t times = 1);
// The n-th call of this function from now on.
void fail_call_of(const std::string& name, size_t n, cudaError_t code);
// How many calls were made to fail since reset().
size_t num_faults();
std::string last_fault();  // name of the last call made to fail

// What cudaMemGetInfo calls total; allocations beyond it fail with cudaErrorMemoryAllocation.
void set_device_bytes(size_t bytes);
// What cudaGetDeviceProperties tells: major * 10 + minor.
void set_compute_capability(int capability);
// During the next cudaGraphInstantiate another process takes so much of the device's memory; it
// gives it back at reset().
void take_during_next_exec(size_t bytes);
// Device memory of an executable, for each of its nodes.
inline constexpr size_t kBytesPerNode = 64 << 10;

}  // namespace fake_cudart
