// CudaBackend: a model on one GPU: weights, KV cache, plans, and the programs and the device that
// the executor runs. Made and filled by the bindings; needs neither torch nor Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "devices/cuda/backend/cuda_backend_options.h"
#include "devices/cuda/backend/gemm_selector.h"
#include "devices/cuda/runtime/graph_cache.h"
#include "devices/cuda/runtime/lane_pool.h"
#include "graph/backend.h"
#include "runtime/device.h"

namespace flowprefill {

// Order of calls: as Backend wants, and make_device() once, after finish() and allocate_cache().
// Each of its calls may throw CudaError too.
class CudaBackend final : public Backend {
 public:
  // Takes all memory for the weights. Its programs choose tokens: the graph gets an operator for
  // it. Throws std::invalid_argument naming the operator or the field, its value and what is
  // allowed; CudaError.
  CudaBackend(ModelGraph graph, CudaBackendOptions options);
  // A model with the weights of another, whose finish() has been called (std::logic_error), on the
  // same device (std::invalid_argument): go on with allocate_cache(). Either may end first.
  CudaBackend(const CudaBackend& weights_of, CudaBackendOptions options);
  ~CudaBackend() override;
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  // Rounds matrices to bf16; to e4m3, by rows, those that the options want so.
  void load(const std::string& source, const float* values, int64_t rows, int64_t columns) override;
  // Of fp8_sources. A row: its e4m3 codes, then a float, their scale.
  void load_blocks(const std::string& source, const uint8_t* bytes, int64_t rows,
                   int64_t row_bytes) override;
  void finish() override;
  size_t weight_bytes() const override;

  // Takes memory for the KV cache and for the lanes. block_tokens: a power of two.
  void allocate_cache(int32_t block_tokens, int32_t blocks) override;
  size_t bytes_per_block(int32_t block_tokens) const override;
  // Device memory of the lanes, their inputs and scratch, which allocate_cache() takes in addition
  // to the cache, for blocks of this many tokens.
  size_t lane_bytes(int32_t block_tokens) const;
  KvStore* kv() override;

  // The device for the executor. Its attach() measures GEMMs and, if `warm` names the options that
  // runs will have, captures the graphs of the smallest buckets.
  std::unique_ptr<Device> make_device(const std::optional<PlanOptions>& warm = std::nullopt);

  // A CudaModelProgram.
  std::unique_ptr<ModelProgram> make_program(Batch batch, const PlanOptions& options,
                                             const ProgramOptions& program) override;

  // Why cuBLASLt is not used; empty: it is.
  const std::string& library_failure() const;
  // Why the measured choices of GEMM kernels were not kept; empty: they were, or none are kept.
  std::string gemm_cache_failure() const;
  // Thread: any, after allocate_cache().
  GraphReport graph_report() const;
  LaneReport lane_report() const;
  // What measuring the GEMM kernels found; empty before make_device()'s attach().
  std::vector<GemmReport> gemm_report() const;

 private:
  struct State;

  KvLayout kv_layout(int32_t block_tokens, int32_t blocks) const;
  void require_ready() const;

  const std::shared_ptr<State> state_;  // programs share it
};

}  // namespace flowprefill
