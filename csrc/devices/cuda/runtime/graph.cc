#include "devices/cuda/runtime/graph.h"

namespace flowprefill {

size_t Graph::num_nodes(const CallContext& context) const {
  size_t count = 0;
  FP_CUDA(cudaGraphGetNodes(get(), nullptr, &count), context);
  return count;
}

GraphExec::GraphExec(const Graph& graph, cudaStream_t stream, const CallContext& context)
    : GraphExec([&] {
        cudaGraphExec_t exec = nullptr;
        FP_CUDA(cudaGraphInstantiate(&exec, graph.get(), 0), context);
        return exec;
      }()) {
  FP_CUDA(cudaGraphUpload(get(), stream), context);
}

Graph capture(cudaStream_t stream, const std::function<void(cudaStream_t)>& record,
              const CallContext& context) {
  FP_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), context);
  cudaGraph_t graph = nullptr;
  try {
    record(stream);
  } catch (...) {
    ignore(cudaStreamEndCapture(stream, &graph));
    const Graph dropped(graph);
    throw;
  }
  FP_CUDA(cudaStreamEndCapture(stream, &graph), context);
  return Graph(graph);
}

}  // namespace flowprefill
