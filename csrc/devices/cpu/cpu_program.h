// CpuProgram: the program of one batch on the CPU: its plan, its activations, and how the compute
// team shares the work of a step. Made by CpuBackend, executed by the executor segment by segment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "devices/cpu/cpu_operators.h"
#include "devices/cpu/product_shares.h"
#include "graph/backend.h"
#include "graph/compiled_program.h"

namespace flowprefill {

// Rows of a tile for each team member: weights are read once for them. AMX multiplies by twice as
// many in the time in which weights arrive.
int32_t rows_per_member();
// Rows of a tile behind the layers: so many are efficient, and their logits of 256k tokens 64 MiB.
inline constexpr int32_t kHeadTileRows = 64;

// Bytes of all activations alive in this process. Thread: any.
size_t live_workspace_bytes();

template <typename T>
class CpuProgram final : public ModelProgram {
 public:
  // Batch and options have been checked; sampling is for each sequence exactly where the graph
  // chooses tokens.
  CpuProgram(CompiledProgram compiled, std::shared_ptr<const CpuWeights<T>> weights,
             std::shared_ptr<KvCache> cache, std::shared_ptr<BufferPool> pool, Batch batch,
             const ProgramOptions& options, int threads);
  ~CpuProgram() override;

  size_t size() const override { return compiled_.size(); }
  SegmentLabel label(size_t i) const override { return compiled_.label(i); }
  std::optional<OperatorWork> work(size_t i) const override { return compiled_.work(i); }
  void execute(size_t i, const ExecutionContext& context) override;
  size_t live_bytes(size_t cursor) const override;
  void give_back_dead(size_t cursor) override;

  const float* logits() const override;
  std::span<const int32_t> sampled() const override;
  std::span<const PromptScore> scores() const override;
  std::span<const float> embeddings() const override;
  int64_t logits_stride() const override { return vocab_size(); }
  int32_t num_sequences() const override { return batch_.num_sequences(); }
  int32_t vocab_size() const override { return compiled_.graph().vocab_size; }
  size_t workspace_bytes() const override;

 private:
  // The last operator behind the layers whose output, no product, has such rows; null: none.
  const Operator* last_of(Extent extent) const;
  void take_missing();
  void give(Buffer& buffer);
  void give_all();
  size_t tensor_bytes(int32_t tensor) const;
  void execute_step(const Step& step);
  void execute_chain(const Step& step, int32_t first, int32_t last);
  void execute_shared(const Step& step, const Operator& op);
  const std::byte* prepare_input(const Step& step, const Operator& op);
  bool wants_all_rows(int32_t first, int32_t last) const;
  size_t weight_bytes(int32_t first, int32_t last) const;
  void execute_attention(const Step& step, const Operator& op);

  const CompiledProgram compiled_;
  const std::shared_ptr<const CpuWeights<T>> weights_;
  const std::shared_ptr<KvCache> cache_;
  const std::shared_ptr<BufferPool> pool_;
  const Batch batch_;
  const std::vector<SamplingParams> sampling_;
  const int threads_;
  const int64_t number_;  // of all programs of this process
  const bool has_logits_;
  const int64_t fail_at_;
  Team* team_ = nullptr;  // while a segment executes
  CpuActivations<T> activations_;
  CpuOperators<T> operators_;
  bool is_missing_some_ =
      true;  // tensors without memory: before the first segment, after a suspension
};

}  // namespace flowprefill
