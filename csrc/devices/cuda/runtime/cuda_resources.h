// CudaResources: what the device and all programs of one model share: stream, graphs, lanes, pinned
// memory. Made by CudaBackend before the CudaDevice; lives as long as the last program.
#pragma once

#include <memory>

#include "devices/cuda/runtime/graph_cache.h"
#include "devices/cuda/runtime/lane_pool.h"
#include "devices/cuda/runtime/memory.h"
#include "devices/cuda/runtime/stream.h"

namespace flowprefill {

struct CudaOptions {
  int device = 0;
  LaneOptions lanes = {};
  GraphCacheOptions graphs = {};
};

// Destroy only with nothing in flight: after the executor stopped. May happen on any thread.
class CudaResources {
 public:
  // Makes the calling thread's current device `options.device`. Throws CudaError,
  // std::invalid_argument.
  explicit CudaResources(const CudaOptions& options)
      : device_((FP_CUDA(cudaSetDevice(options.device)), options.device)),
        stream_(Stream::make()),
        pinned_(options.device),
        lanes_(options.device, options.lanes, pinned_),
        graphs_(options.graphs) {}
  ~CudaResources() { ignore(cudaSetDevice(device_)); }
  CudaResources(const CudaResources&) = delete;
  CudaResources& operator=(const CudaResources&) = delete;

  int device() const { return device_; }
  cudaStream_t stream() const { return stream_.get(); }
  void synchronize() const { stream_.synchronize(); }
  PinnedPool& pinned() { return pinned_; }
  LanePool& lanes() { return lanes_; }
  GraphCache& graphs() { return graphs_; }

 private:
  const int device_;
  const Stream stream_;  // everything segments launch goes here, in order
  PinnedPool pinned_;
  LanePool lanes_;
  GraphCache graphs_;
};

}  // namespace flowprefill
