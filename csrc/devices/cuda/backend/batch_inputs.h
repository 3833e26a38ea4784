// batch_inputs(): the bytes that a run's kernels read on the device: tokens, sequences, positions,
// block tables, attention tiles. Called by CudaBackend::make_program().
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "devices/cuda/backend/plan_shape.h"
#include "devices/cuda/kernels/attention_args.h"
#include "graph/batch.h"
#include "graph/sampling_params.h"

namespace flowprefill {

// KV blocks of the longest sequence, its new tokens included.
int32_t longest_table(const Batch& batch, int32_t block_tokens);

// A slice for launch_attention_hopper(), parted where its rows have other chunks or none.
std::vector<AttentionSlice> row_slices(AttentionSlice slice, const KeyChunks& chunks);

// Laid out by shape.inputs. Whatever the batch does not fill is zero, which kernels take as
// padding; -1 in last_rows. The batch has been checked and fits shape.sizes().
std::vector<std::byte> batch_inputs(const PlanShape& shape, const Batch& batch,
                                    std::span<const SamplingParams> sampling);

}  // namespace flowprefill
