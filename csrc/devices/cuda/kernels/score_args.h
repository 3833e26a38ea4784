// ScoreArgs, PoolArgs: what is kept of all rows of a prompt behind the layers: scores of the tokens
// that follow, and means of sequences. Filled by OperatorKernels, which launches the kernels
// (kernels.h), read by score_body.h.
#pragma once

#include "devices/cuda/kernels/batch_view.h"
#include "graph/prompt_score.h"

namespace flowprefill {

// Rows of one step: the views start at its first. The token after a row is the next row's, if that
// is of the same sequence, else its sequence's next_tokens.
struct ScoreArgs {
  BatchView batch = {};                  // tokens, sequences
  const int32_t* next_tokens = nullptr;  // [sequences] -1: none is known
  const float* logits = nullptr;         // [rows, width]
  int64_t ld_logits = 0;
  PromptScore* out = nullptr;  // [rows]; those of padding are left as they are
  int32_t rows = 0;
  int32_t batch_rows = 0;  // from the step's first to the batch's end, padding included
  int32_t width = 0;       // vocabulary
};

// Adds the rows of one step to the means of their sequences. Steps come in the order of rows.
struct PoolArgs {
  BatchView batch = {};                // sequences
  const int32_t* last_rows = nullptr;  // [sequences] in the batch; they are packed in order
  const float* in = nullptr;           // [rows, width]
  int64_t ld_in = 0;
  float* out = nullptr;  // [sequences, width]
  int64_t ld_out = 0;
  int32_t row_begin = 0;  // of the step, in the batch
  int32_t rows = 0;
  int32_t width = 0;
};

// Each throws std::invalid_argument naming the field, its value and what is allowed.
void check(const ScoreArgs& args);
void check(const PoolArgs& args);

}  // namespace flowprefill
