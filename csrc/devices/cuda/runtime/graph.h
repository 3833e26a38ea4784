// Graph and GraphExec: owners of a captured graph and of its executable; capture() makes a graph.
// Called by GraphCache.
#pragma once

#include <cstddef>
#include <functional>

#include "devices/cuda/runtime/handle.h"

namespace flowprefill {

class Graph : public Handle<cudaGraph_t, cudaGraphDestroy> {
 public:
  using Handle::Handle;

  size_t num_nodes(const CallContext& context = {}) const;
};

class GraphExec : public Handle<cudaGraphExec_t, cudaGraphExecDestroy> {
 public:
  GraphExec() = default;

  // Instantiates the graph and uploads it through `stream`, so that the first launch pays nothing.
  // The graph is no longer needed afterwards. Throws CudaError.
  GraphExec(const Graph& graph, cudaStream_t stream, const CallContext& context);

  void launch(cudaStream_t stream, const CallContext& context) const {
    FP_CUDA(cudaGraphLaunch(get(), stream), context);
  }

 private:
  using Handle::Handle;
};

// Calls `record` with the stream in capture and returns what it launched there. Nothing is
// executed.
//
// Thread-local mode: what other threads do (an allocation, a query) does not break the capture,
// what this thread does may. Whatever is thrown, by CUDA or by `record`, the stream is out of
// capture after.
Graph capture(cudaStream_t stream, const std::function<void(cudaStream_t)>& record,
              const CallContext& context);

}  // namespace flowprefill
