// CudaModel: a decoder on one GPU: weights, KV cache, plans, and the programs and the device that
// the executor runs. Made and filled by the bindings; needs neither torch nor Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "devices/cuda/backend/gemm_selector.h"
#include "devices/cuda/kernels/sampling_params.h"
#include "devices/cuda/runtime/cuda_program.h"
#include "devices/cuda/runtime/graph_cache.h"
#include "devices/cuda/runtime/lane_pool.h"
#include "graph/batch.h"
#include "graph/model_config.h"
#include "graph/planner.h"
#include "runtime/device.h"
#include "runtime/segment.h"

namespace flowprefill {

// Slices of whole tiles of the matrix kernels (64 to 256 rows), and not so few that most
// multiprocessors idle. Assumed, not measured.
inline constexpr CutRules kCudaCuts{.row_step = 256,
                                    .max_tile_rows = 4096,
                                    .min_tile_rows = 1024,
                                    .min_head_blocks = 128,
                                    .embed_rows = 1 << 30,
                                    .embed_row_s = 2e-8};

struct CudaModelOptions {
  int device = 0;
  double spin_s = 50e-6;         // polls this long before it sleeps: see CudaDeviceOptions
  int run_ahead = 2;             // segments the host may be ahead, 1 to 4
  int32_t num_lanes = 2;         // runs whose activations stay on the device while suspended
  int32_t max_tokens = 8192;     // new tokens of the largest batch
  int32_t max_sequences = 64;    // of the largest batch
  int32_t max_context = 131072;  // tokens of the longest sequence, its new ones included
  std::vector<int32_t> buckets;  // ascending token counts that have graphs; empty: powers of two
  bool has_graphs = true;        // false: every segment is launched eagerly
  size_t graph_bytes = size_t{1} << 30;         // device memory of executables at most
  size_t device_spill_bytes = size_t{1} << 30;  // of suspended runs without a lane; then the host's
  int32_t warm_tokens = 256;    // make_device() captures the buckets up to this ahead of time
  bool measures_gemms = false;  // make_device() measures the GEMM kernels unless the cache knows
  std::string gemm_cache_path;  // file of measured GEMM choices; empty: none
  std::vector<std::string> cublas_lt_libraries;  // see GemmOptions
  CutRules cuts = kCudaCuts;
};

// One run of the model over one batch. Made by CudaModel::make_program(), executed by the executor
// on the device of CudaModel::make_device(). May outlive the model object, not the process's GPU.
class CudaModelProgram : public Program {
 public:
  // [sequences, logits_stride()] float on the host, the first vocab_size() of each row; null unless
  // asked for in make_program(). Meaningful once the run has finished.
  virtual const float* logits() const = 0;
  // Elements between rows of logits: at least vocab_size().
  virtual int64_t logits_stride() const = 0;
  // [sequences] the chosen tokens; -1 where the logits have no answer (NaN). Meaningful once the
  // run has finished.
  virtual std::span<const int32_t> sampled() const = 0;
  virtual int32_t num_sequences() const = 0;
  virtual int32_t vocab_size() const = 0;
  // Bytes of a lane that it uses.
  virtual size_t workspace_bytes() const = 0;
  // The token bucket it is padded to; 0: exact size, no graphs.
  virtual int32_t bucket() const = 0;
};

struct CudaProgramOptions {
  bool fetch_logits = true;
  int64_t fail_at = -1;  // >= 0: that segment throws (tests)
};

// Order of calls: load() for every tensor, finish(), allocate_cache(), make_device() once,
// make_program() for each run. Out of order: std::logic_error.
class CudaModel {
 public:
  // Takes all memory for the weights. Throws std::invalid_argument naming the field, its value and
  // what is allowed (also where no kernel takes the model's shape), CudaError.
  CudaModel(ModelConfig config, CudaModelOptions options);
  ~CudaModel();
  CudaModel(const CudaModel&) = delete;
  CudaModel& operator=(const CudaModel&) = delete;

  // Takes one tensor by its canonical name ("layers.3.q", "embed", ...), float, row-major, rows *
  // columns values (columns 1 for vectors); rounds matrices to bf16 and uploads them; done with
  // `values` when it returns. Throws std::invalid_argument for an unknown name or a wrong shape
  // (name, shape, expected), CudaError. Thread: one at a time.
  void load(const std::string& name, const float* values, int64_t rows, int64_t columns);

  // Waits for the uploads. Throws std::invalid_argument naming a tensor that is missing.
  void finish();

  // Takes memory for the KV cache and for the lanes. block_tokens: a power of two. Once only.
  // Throws std::invalid_argument, CudaError (is_out_of_memory()), std::logic_error.
  void allocate_cache(int32_t block_tokens, int32_t blocks);

  // Device memory of one KV block over all layers.
  size_t bytes_per_block(int32_t block_tokens) const;
  // Device memory of the lanes, their inputs and scratch, which allocate_cache() takes beside the
  // cache, for blocks of this many tokens.
  size_t lane_bytes(int32_t block_tokens) const;

  // Clears blocks that no run uses now; waits until they are clear. Thread: any.
  void zero_blocks(std::span<const int32_t> blocks);

  size_t weight_bytes() const;
  const ModelConfig& config() const;
  const CudaModelOptions& options() const;

  // The device for the executor; once per model. Its attach() measures GEMMs and, if `warm` names
  // the options that runs will have, captures the graphs of the smallest buckets.
  std::unique_ptr<Device> make_device(const std::optional<PlanOptions>& warm = std::nullopt);

  // A program over `batch`. options: granularity, budget and rates are used; threads and
  // element_bytes are not. sampling: one per sequence, or none: the most likely tokens.
  // Throws std::invalid_argument naming what does not fit: a token outside the vocabulary, a block
  // table too short or with a block the cache has not, too many tokens or sequences. Thread: any.
  std::unique_ptr<CudaModelProgram> make_program(const Batch& batch, const PlanOptions& options,
                                                 std::span<const SamplingParams> sampling = {},
                                                 const CudaProgramOptions& program = {});

  // Thread: any, after allocate_cache().
  GraphReport graph_report() const;
  LaneReport lane_report() const;
  // What measuring the GEMM kernels found; empty before make_device()'s attach().
  std::vector<GemmReport> gemm_report() const;

 private:
  struct State;

  // With what the GPU decides itself: threads, element size, cuts.
  PlanOptions on_device(PlanOptions options) const;

  const std::shared_ptr<State> state_;  // programs share it
};

}  // namespace flowprefill
