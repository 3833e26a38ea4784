// GemmSelector: which kernel computes a matrix product, by what was measured on this GPU or else by
// a guess. Made once per model by CudaBackend; its segments launch through it.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "devices/cuda/backend/gemm_choices.h"
#include "devices/cuda/runtime/cuda_error.h"
#include "runtime/thread_annotations.h"

namespace flowprefill {

// One way to compute a product: a kernel, or several in a row.
struct GemmCandidate {
  std::string name = {};     // in the cache and in reports, e.g. "hopper_128x256 + gate"
  size_t scratch_bytes = 0;  // of device memory that launch() may write
  // Capturable; returns what the launch returned. Throws std::invalid_argument for arguments that
  // no candidate takes, std::runtime_error for those that this one refuses: nothing was launched.
  std::function<cudaError_t(const GemmArgs&, std::span<std::byte> scratch, cudaStream_t)> launch =
      {};
  // What launch() of this shape needs, and what takes too long between two segments. Throws as
  // launch(); empty: it needs nothing.
  std::function<void(const GemmArgs&)> prepare = {};
  // Kernels that launch() launches; empty: one.
  std::function<int32_t(const GemmArgs&)> num_kernels = {};

  int32_t kernels_of(const GemmArgs& args) const { return num_kernels ? num_kernels(args) : 1; }
};

// The candidates for these arguments, best guess first. Depends on everything but the pointers.
using GemmCandidates = std::function<std::vector<GemmCandidate>(const GemmArgs&)>;

// What was measured of one shape.
struct GemmTiming {
  std::string candidate = {};
  double us = 0;             // median device time of one launch
  std::string failure = {};  // why it was left out; empty: measured
};
struct GemmReport {
  GemmShape shape = {};
  int32_t rows = 0;         // of the products that were measured
  std::string chosen = {};  // empty: every candidate failed, the guess stays
  bool is_from_cache = false;
  std::vector<GemmTiming> timings = {};  // in the order of the candidates
};

class GemmSelector {
 public:
  // cache_path: file of measured choices, read now and written by measure_all(); empty: none. A
  // file that is missing, damaged or of another device or version counts as empty.
  GemmSelector(GemmDevice device, std::string cache_path, GemmCandidates candidates);

  // Enough for any candidate, so that measuring later changes nothing about it.
  size_t scratch_bytes(const GemmArgs& args) const;

  // Gets the choices for these products ready to launch. What a candidate may say late it says
  // here. May take a millisecond for a shape that is new, nothing for one that is not. Thread: any.
  void prepare(std::span<const GemmArgs> products) const;

  // Launches the measured choice for the shape of `args`, or the best guess; if that refuses them,
  // the next candidate, now and later. Capturable: waits for nothing and allocates nothing on the
  // device. Which kernel runs for a shape changes with a refusal and in measure_all() only. Throws
  // CudaError, std::invalid_argument; what the first candidate said if all refuse. Thread: any.
  void launch(const GemmArgs& args, std::span<std::byte> scratch, cudaStream_t stream,
              const CallContext& context = {}) const;

  // Kernels that launch() would launch, by the choice as it stands. Thread: any.
  int32_t num_kernels(const GemmArgs& args) const;

  // Whether launch() would launch the candidate of that name, as the choice stands. Thread: any.
  bool chooses(const GemmArgs& args, std::string_view name) const;

  // Measures every shape among `products` that is not known yet and writes the cache. Products of
  // one shape take turns, so giving each layer's finds the weights in memory rather than in cache.
  // Their a, b, bias and d must be valid for all rows; d and scratch are overwritten. Call before
  // serving, with no capture on `stream` and no launch() elsewhere: it waits for the device.
  // A candidate that fails is left out, its reason reported; a cache that cannot be written is
  // reported by cache_failure(). Throws CudaError where the device itself fails.
  std::vector<GemmReport> measure_all(std::span<const GemmArgs> products,
                                      std::span<std::byte> scratch, cudaStream_t stream);

  // Why the cache was not written last; empty: it was, or there is none. Thread: any.
  std::string cache_failure() const;

 private:
  // The candidates for one shape: the choice first, then the others by guess.
  struct Ranking {
    std::vector<GemmCandidate> candidates = {};
    std::atomic<size_t> first = 0;  // not refused yet
    std::atomic<bool> is_prepared = false;
  };

  std::shared_ptr<Ranking> ranking_of(const GemmArgs& args) const;
  GemmReport measure(const GemmShape& shape, std::span<const GemmArgs> products,
                     std::span<std::byte> scratch, cudaStream_t stream);

  const GemmDevice device_;
  const std::string cache_path_;
  const GemmCandidates candidates_;
  mutable Mutex mutex_;
  std::string cache_failure_ FP_GUARDED_BY(mutex_);
  GemmChoices choices_ FP_GUARDED_BY(mutex_);  // measured, by this process or the cache's writer
  // Asked for so far.
  mutable std::map<GemmShape, std::shared_ptr<Ranking>> rankings_ FP_GUARDED_BY(mutex_);
};

}  // namespace flowprefill
