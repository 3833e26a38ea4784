// The planner: cuts a batch's work into steps and groups steps into segments. Called by the program
// builder.
//
// A step is a range of operators of one layer over one range of rows. Inside a layer everything but
// attention is row-wise, and attention of rows [a, b) reads keys of rows < b only; so tiles of rows
// go through a whole layer one after another, each while its activations are in cache. All
// granularities are orders and groupings of the same operators.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "graph/batch.h"
#include "graph/model_config.h"

namespace flowprefill {

enum class Op : uint8_t {
  kEmbed,
  kAttnNorm,
  kQkv,
  kRope,
  kAttention,
  kOutput,
  kMlpNorm,
  kGateUp,
  kDown,
  kFinalNorm,
  kHead
};
const char* op_name(Op op);

struct Step {
  Op first = Op::kEmbed;  // operators [first, last]
  Op last = Op::kEmbed;
  int32_t layer = 0;
  int32_t row_begin = 0;  // kHead: 64-column blocks of the vocabulary instead of rows
  int32_t row_end = 0;
  int32_t base = 0;        // row that lies at the start of the tile buffers
  int32_t head_begin = 0;  // a slice of attention: KV heads [head_begin, head_end)
  int32_t head_end = 0;    // 0: all
  double predicted_s = 0;
};

// Measured speed of this machine for this model (flowprefill/scheduling/cost_model.py has the
// formula).
struct MachineRates {
  double gemm_flops_per_s = 1e11;
  double attention_flops_per_s = 5e10;
  double weight_bytes_per_s = 1e10;
  double step_overhead_s = 5e-6;
};

enum class Granularity : uint8_t { kNone, kLayer, kOperator, kChunk, kBudget };

// Where a device wants its cuts; the defaults are the CPU's.
struct CutRules {
  int32_t row_step = 16;        // rows of a slice are a multiple of it: the product's row block
  int32_t max_tile_rows = 0;    // rows that go through a layer together; 0: kRowsPerMember a thread
  int32_t min_tile_rows = 0;    // fewer are inefficient (below 97 % of the rate); 0: a row_step a
                                // thread
  int32_t min_head_blocks = 0;  // of 64 columns, in a slice of the head; 0: 8 a thread
  bool slices_heads = true;     // attention by KV heads before rows: few rows at once are slow
  int32_t embed_rows = 512;     // embedding rows a step
  double embed_row_s = 1.5e-6;  // embedding and rotary table of one row, one thread
};

struct PlanOptions {
  Granularity granularity = Granularity::kBudget;
  double budget_s = 2e-3;      // kBudget: longest wanted segment
  int32_t chunk_tokens = 512;  // kChunk
  int32_t threads = 1;
  int32_t element_bytes = 2;
  MachineRates rates;
  CutRules cuts = {};
};

struct Plan {
  std::vector<Step> steps;
  std::vector<uint32_t> segments;  // index of the first step of each segment
  int32_t buffer_rows = 0;         // rows the tile buffers must hold
};

// Rows from which a team member gets rows of its own (below, members share columns): the weights
// are then read once per this many rows and member.
inline constexpr int32_t kRowsPerMember = 64;

Plan make_plan(const ModelConfig& config, const Batch& batch, const PlanOptions& options);

// Predicted seconds of each step on `batch`, which may have fewer rows than the steps' plan was
// made for: products are those of all rows of a step, attention that of the batch's rows alone.
std::vector<double> predict_steps(const ModelConfig& config, const Batch& batch,
                                  const PlanOptions& options, std::span<const Step> steps);

}  // namespace flowprefill
