// Cost: work of operators on a batch, and the time it is predicted to take. Called by the planner:
// to cut a batch, and to predict the segments of a plan for another batch.
#pragma once

#include <cstdint>
#include <vector>

#include "graph/batch.h"
#include "graph/model_graph.h"

namespace flowprefill {

// What operators ask of a machine, by the rate that bounds them: each operator is counted in one of
// these.
struct OperatorWork {
  double product_flops = 0;
  double weight_bytes = 0;  // of products whose weights take longer to read than to multiply
  double attention_flops = 0;
  double cache_bytes = 0;  // of keys and values: decode steps that take longer to read than compute
  double other_s = 0;      // seconds that no rate tells

  OperatorWork& operator+=(const OperatorWork& more);
  OperatorWork& operator*=(double share);
};

// Measured speed of this machine for this model (flowprefill/scheduling/cost_model.py has the
// formula).
struct MachineRates {
  double gemm_flops_per_s = 1e11;
  double attention_flops_per_s = 5e10;
  double weight_bytes_per_s = 1e10;
  double step_overhead_s = 5e-6;
  double cache_bytes_per_s = 1e10;

  double seconds(const OperatorWork& work) const;
};

// How a device spends time that the rates do not tell.
struct CostRules {
  int32_t weight_element_bytes = 2;  // of weights that do not tell their stored_bytes
  double embed_row_s = 1.5e-6;       // embedding and rotary table of one row
  double kept_element_s = 5e-10;     // scoring and pooling: each element that they read
  int32_t cache_element_bytes = 0;   // of keys and values; 0: reading them costs nothing
};

// A range of operators over a range of rows. The planner makes steps, a device executes them.
struct Step {
  int32_t first = 0;  // operators [first, last] of the graph
  int32_t last = 0;
  int32_t row_begin = 0;  // of the batch; of its sequences where the operators' rows are sequences
  int32_t row_end = 0;
  int32_t base = 0;        // row that lies at the start of the tile tensors
  int32_t part_begin = 0;  // parts [part_begin, part_end) of one operator (ModelGraph::parts)
  int32_t part_end = 0;    // 0: all
  OperatorWork work = {};
  double predicted_s = 0;

  int32_t rows() const { return row_end - row_begin; }
  bool is_whole() const { return part_end == 0; }
};

// Row-wise work is in the measured rate of the products next to it, so only products, attention,
// embedding, scoring and pooling have a cost of their own.
class Cost {
 public:
  // All three live as long as this.
  Cost(const ModelGraph& graph, const Batch& batch, const MachineRates& rates, CostRules rules);

  // Work and seconds of a step, its overhead included. Rows beyond the batch are padding: products
  // compute them, attention does not.
  OperatorWork step_work(const Step& step) const;
  double step_s(const Step& step) const { return rates_.seconds(step_work(step)); }
  // Seconds of operators [first, last] over rows [begin, end).
  double range_s(int32_t first, int32_t last, int32_t begin, int32_t end) const;
  double operator_s(const Operator& op, int32_t begin, int32_t end) const;

 private:
  OperatorWork work_of(const Operator& op, int32_t begin, int32_t end) const;
  OperatorWork product_work(const Operator& op, int32_t rows) const;
  OperatorWork attention_work(const Operator& op, int32_t begin, int32_t end) const;

  const ModelGraph& graph_;
  const Batch& batch_;
  const MachineRates& rates_;
  const CostRules rules_;
  std::vector<int64_t> keys_before_;  // [rows + 1] keys seen by all rows before this one
  bool is_decode_ = true;             // one row a sequence
};

}  // namespace flowprefill
