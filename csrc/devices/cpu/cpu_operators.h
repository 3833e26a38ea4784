// CpuOperators: executes single operators over some rows and parts of one run's activations. Called
// by CpuProgram on the threads of the compute team.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "devices/cpu/attention.h"
#include "devices/cpu/buffer.h"
#include "devices/cpu/cpu_weights.h"
#include "devices/cpu/kv_cache.h"
#include "graph/batch.h"
#include "graph/cost.h"
#include "graph/model_graph.h"
#include "graph/sampling_params.h"

namespace flowprefill {

// Rows [begin, end) of the batch, or of its sequences.
struct RowRange {
  int32_t begin = 0;
  int32_t end = 0;
};

// What the operators of one run work on.
template <typename T>
struct CpuActivations {
  const ModelGraph& graph;
  const CpuWeights<T>& weights;
  KvCache& cache;
  const Batch& batch;
  std::span<const SamplingParams> sampling;  // one for each sequence, where it chooses tokens
  std::vector<int32_t> sequence_of_row;
  std::vector<Buffer> tensors;  // by index into the graph's tensors

  const Sequence& sequence_of(int32_t row) const {
    return batch.sequences[static_cast<size_t>(sequence_of_row[static_cast<size_t>(row)])];
  }
  // Row `row` of the batch or of its sequences, in a tensor. E: its element type.
  template <typename E>
  E* at(int32_t tensor, const Step& step, int32_t row) {
    const Tensor& t = graph.tensor(tensor);
    const bool is_of_tile = t.extent == Extent::kTile || t.extent == Extent::kHeadTile;
    const int32_t base = is_of_tile ? step.base : 0;
    return tensors[static_cast<size_t>(tensor)].template as<E>() + int64_t{row - base} * t.columns;
  }
};

// Rows of one sequence whose positions lie in one block of the cache may not be split between two
// calls at once; everything else may be.
template <typename T>
class CpuOperators {
 public:
  // `activations` lives as long as this.
  explicit CpuOperators(CpuActivations<T>& activations) : a_(activations) {}

  // Executes all but attention. Products and pooling make column blocks [begin, end) of their
  // output, others all. input: those rows as prepare_input() makes them, or null: a product
  // prepares its own.
  void execute(const Operator& op, const Step& step, RowRange rows, int64_t begin, int64_t end,
               const std::byte* input = nullptr);

  // Brings rows of a product's input into the form its weight wants (Linear::prepare).
  void prepare_input(const Operator& op, const Step& step, RowRange rows, std::byte* prepared);

  // The pieces of attention of a step, for a team of so many threads.
  std::vector<AttentionItem> attention_items(const Operator& op, const Step& step, int threads);
  AttentionArgs<T> attention_args(const Operator& op);

 private:
  void embed(const Operator& op, const Step& step, RowRange rows);
  void rotary(const Operator& op, const Step& step, RowRange rows);
  void norm(const Operator& op, const Step& step, RowRange rows);
  void linear(const Operator& op, const Step& step, RowRange rows, int64_t begin, int64_t end,
              const std::byte* input);
  void store_product(const Operator& op, const Step& step, RowRange rows, int64_t begin,
                     int64_t end, const void* input);
  void add_product(const Operator& op, const Step& step, RowRange rows, int64_t begin, int64_t end,
                   const void* input);
  void rope(const Operator& op, const Step& step, RowRange rows);
  void rotate_queries(const Operator& op, const Step& step, RowRange rows);
  void store_keys_and_values(const Operator& op, const Step& step, RowRange rows,
                             const Sequence& sequence);
  // What all heads of the queries, or of the keys, have in common; `first`: their first column.
  RopeHead rope_heads(const Operator& op, int32_t norm, double scale, int64_t first) const;
  // Of the queries or keys of a row of them all; 0 where each head has a norm of its own, or none.
  float inverse_rms(const Operator& op, int32_t norm, const float* row, int64_t first) const;
  void residual(const Operator& op, const Step& step, RowRange rows);
  void round(const Operator& op, const Step& step, RowRange rows);
  void score(const Operator& op, const Step& step, RowRange rows);
  void choose(const Operator& op, const Step& step, RowRange rows);
  void pool(const Operator& op, const Step& step, RowRange rows, int64_t begin, int64_t end);

  CpuActivations<T>& a_;
};

}  // namespace flowprefill
