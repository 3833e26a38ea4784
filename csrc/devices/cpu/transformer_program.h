// TransformerProgram: the program of one batch on one model — plan, workspace, and the operators'
// execution. Built by the engine through csrc/bindings, executed by the executor segment by
// segment.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "devices/cpu/attention.h"
#include "devices/cpu/kv_cache.h"
#include "devices/cpu/weights.h"
#include "graph/batch.h"
#include "graph/planner.h"
#include "runtime/segment.h"

namespace flowprefill {

// A program whose result is one row of logits per sequence.
class LogitsProgram : public Program {
 public:
  // [sequences, vocab] float, row-major; meaningful once the run has finished.
  virtual const float* logits() const = 0;
  virtual int32_t num_sequences() const = 0;
  virtual int32_t vocab_size() const = 0;
  // Bytes of the workspace: activations that live as long as the program.
  virtual size_t workspace_bytes() const = 0;
};

// Bytes of all workspaces alive in this process. Thread: any.
size_t live_workspace_bytes();

template <typename T>
class TransformerProgram final : public LogitsProgram {
 public:
  // Throws std::invalid_argument naming what does not fit: a token outside the vocabulary, a block
  // table too short or with a block the cache has not, an empty sequence. fail_at >= 0 makes that
  // segment throw (tests).
  TransformerProgram(std::shared_ptr<const Weights<T>> weights, std::shared_ptr<KvCache> cache,
                     std::shared_ptr<BufferPool> pool, Batch batch, const PlanOptions& options,
                     int64_t fail_at = -1);
  ~TransformerProgram() override;

  size_t size() const override { return plan_.segments.size(); }
  SegmentLabel label(size_t i) const override;
  void execute(size_t i, const ExecutionContext& context) override;
  size_t live_bytes(size_t cursor) const override;

  const float* logits() const override { return logits_.as<float>(); }
  int32_t num_sequences() const override { return static_cast<int32_t>(batch_.sequences.size()); }
  int32_t vocab_size() const override { return c_.vocab_size; }
  size_t workspace_bytes() const override;

 private:
  struct Rows {
    int32_t begin, end;
  };

  void check_batch() const;
  void allocate();
  size_t segment_end(size_t i) const;
  void execute_step(const Step& step);
  void execute_chain(const Step& step, Op first, Op last);
  void execute_shared(const Step& step, Op op);
  int64_t column_blocks(Op op, int32_t layer) const;

  // One operator over `rows` and column blocks [begin, end) of its output (row operators ignore
  // them).
  void execute_op(const Step& step, Op op, Rows rows, int64_t begin, int64_t end);
  void embed(Rows rows);
  void norm(const std::vector<float>& weight, const Step& step, Rows rows);
  void rope(const Step& step, Rows rows);
  void rotate_queries(const Step& step, Rows rows);
  void store_keys_and_values(const Step& step, Rows rows, const Sequence& sequence);
  void add_projection(const PackedLinear<T>& linear, const std::vector<float>& bias, const T* input,
                      Rows rows, int64_t begin, int64_t end);
  void gate_up(const Step& step, Rows rows, int64_t begin, int64_t end);
  void attention(const Step& step);
  void final_norm(Rows sequences);
  void head(int64_t begin, int64_t end);

  T* tile(Buffer& buffer, const Step& step, int32_t row, int64_t width) {
    return buffer.as<T>() + int64_t{row - step.base} * width;
  }
  const float* qkv_row(const Step& step, int32_t row) const {
    return qkv_.as<float>() + int64_t{row - step.base} * c_.qkv_columns();
  }
  const Sequence& sequence_of(int32_t row) const {
    return batch_.sequences[static_cast<size_t>(sequence_of_row_[static_cast<size_t>(row)])];
  }
  float* hidden(int32_t row) { return hidden_.as<float>() + int64_t{row} * c_.hidden_size; }

  const std::shared_ptr<const Weights<T>> weights_;
  const std::shared_ptr<KvCache> cache_;
  const std::shared_ptr<BufferPool> pool_;
  const ModelConfig& c_;
  const Batch batch_;
  const Plan plan_;
  const int32_t threads_;
  const int64_t fail_at_;
  Team* team_ = nullptr;  // while a segment executes
  std::vector<int32_t> sequence_of_row_;

  // The workspace. The residual stream stays in float: rounding it to bf16 at every layer costs
  // more accuracy than everything else together.
  Buffer hidden_;   // float [rows, hidden]
  Buffer rotary_;   // float [rows, head_dim]: cos | sin
  Buffer normed_;   // T [tile, hidden]
  Buffer qkv_;      // float [tile, qkv columns]
  Buffer q_;        // T [tile, q columns]
  Buffer context_;  // T [tile, q columns]: attention's output
  Buffer gated_;    // T [tile, intermediate]
  Buffer last_;     // T [sequences, hidden]
  Buffer logits_;   // float [sequences, vocab]
};

}  // namespace flowprefill
