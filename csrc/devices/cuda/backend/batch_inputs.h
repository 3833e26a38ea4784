// batch_inputs(): the bytes that a run's kernels read on the device: tokens, sequences, positions,
// block tables, attention tiles. check_batch(): whether a batch fits model and cache. Called by
// CudaModel::make_program().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "devices/cuda/backend/plan_shape.h"
#include "devices/cuda/kernels/sampling_params.h"
#include "graph/batch.h"
#include "graph/model_config.h"

namespace flowprefill {

struct BatchLimits {
  int32_t max_tokens = 0;
  int32_t max_sequences = 0;
  int32_t max_context = 0;
  int32_t block_tokens = 0;
  int32_t blocks = 0;
};

// Throws std::invalid_argument naming what does not fit.
void check_batch(const ModelConfig& config, const Batch& batch, const BatchLimits& limits);
void check_sampling(std::span<const SamplingParams> sampling, size_t num_sequences);

// KV blocks of the longest sequence, its new tokens included.
int32_t longest_table(const Batch& batch, int32_t block_tokens);

// Laid out by shape.inputs. Whatever the batch does not fill is zero, which kernels take as
// padding; -1 in last_rows. The batch has been checked and fits shape.sizes.
std::vector<std::byte> batch_inputs(const PlanShape& shape, const Batch& batch,
                                    int32_t block_tokens, std::span<const SamplingParams> sampling);

}  // namespace flowprefill
