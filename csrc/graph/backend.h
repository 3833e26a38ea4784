// Backend: one model on one device: its weights, its KV cache, and the programs that the executor
// runs. Implemented in csrc/devices; made, filled and asked for programs by csrc/bindings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "graph/batch.h"
#include "graph/graph_variants.h"
#include "graph/kv_store.h"
#include "graph/model_graph.h"
#include "graph/planner.h"
#include "graph/prompt_score.h"
#include "graph/sampling_params.h"
#include "runtime/segment.h"

namespace flowprefill {

// A program over one batch, whose result is one row of logits per sequence unless another output
// was asked for. May outlive its backend.
class ModelProgram : public Program {
 public:
  // [sequences, logits_stride()] float on the host, the first vocab_size() of each row; null if
  // they were not asked for, or the output has none. Meaningful once the run has finished.
  virtual const float* logits() const = 0;
  virtual int64_t logits_stride() const = 0;
  virtual int32_t num_sequences() const = 0;
  virtual int32_t vocab_size() const = 0;
  // [sequences] the tokens chosen on the device, -1 where the logits have no answer (NaN); empty
  // where the device does not choose. Meaningful once the run has finished.
  virtual std::span<const int32_t> sampled() const { return {}; }
  // [rows] of what each row's logits say of the token after it; empty unless asked for. Meaningful
  // once the run has finished, as are the embeddings.
  virtual std::span<const PromptScore> scores() const { return {}; }
  // [sequences, columns] row-major; empty unless asked for.
  virtual std::span<const float> embeddings() const { return {}; }
  // What segment i does of this batch; nothing where that is not known. Thread: any.
  virtual std::optional<OperatorWork> work(size_t /*segment*/) const { return std::nullopt; }
  // Bytes of activations that it holds now.
  virtual size_t workspace_bytes() const = 0;
};

struct ProgramOptions {
  // One per sequence, or none: the most likely tokens. Where the device chooses.
  std::span<const SamplingParams> sampling = {};
  bool fetch_logits = true;
  RunOutput output = RunOutput::kLogits;
  int64_t fail_at = -1;  // >= 0: that segment throws (tests)
};

// Order of calls: load() for every tensor, finish(), allocate_cache(), make_program() for each run.
// Out of order: std::logic_error. Making one throws std::invalid_argument naming an operator of the
// graph that the device refuses, and why.
class Backend {
 public:
  virtual ~Backend() = default;

  // Takes one tensor of the checkpoint, float [rows, columns] row-major (columns 1 for vectors);
  // done with `values` when it returns. Throws std::invalid_argument for an unknown name or a wrong
  // shape. Thread: one at a time.
  virtual void load(const std::string& source, const float* values, int64_t rows,
                    int64_t columns) = 0;

  // The same for a tensor that was announced, when the backend was made, to come in its file's
  // quantised blocks: [rows, row_bytes]. Throws std::logic_error where there are none.
  virtual void load_blocks(const std::string& source, const uint8_t* /*bytes*/, int64_t /*rows*/,
                           int64_t /*row_bytes*/) {
    throw std::logic_error("tensor " + source + ": this device takes no quantised blocks");
  }

  // Throws std::invalid_argument naming a tensor that has not come.
  virtual void finish() = 0;
  virtual size_t weight_bytes() const = 0;

  // Takes the memory of the KV cache and of what runs share; once. Throws std::invalid_argument,
  // and std::bad_alloc or the device's error where the memory cannot be had.
  virtual void allocate_cache(int32_t block_tokens, int32_t blocks) = 0;
  // Memory of one KV block over all layers. Throws std::invalid_argument for a size it cannot have.
  virtual size_t bytes_per_block(int32_t block_tokens) const = 0;
  // Null before allocate_cache().
  virtual KvStore* kv() = 0;

  // Throws std::invalid_argument naming what of the batch does not fit. Thread: any.
  virtual std::unique_ptr<ModelProgram> make_program(Batch batch, const PlanOptions& options,
                                                     const ProgramOptions& program) = 0;
};

}  // namespace flowprefill
