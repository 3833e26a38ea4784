// The matrix products of a model by size: how much scratch they want, and which to measure. Called
// by CudaBackend.
#pragma once

#include <cstddef>
#include <vector>

#include "devices/cuda/backend/device_weights.h"
#include "devices/cuda/backend/gemm_selector.h"
#include "devices/cuda/backend/plan_shape.h"

namespace flowprefill {

// Scratch that any product of a plan up to `largest` can want.
size_t scratch_bytes(const GemmSelector& gemms, const PlanShape& largest,
                     const DeviceWeights& weights);

// Products of each size, of some layers, for each of kRowClasses, in a lane that starts at `lane`:
// all shapes that GemmSelector will be asked for.
std::vector<GemmArgs> products_to_choose(const PlanShape& largest, const DeviceWeights& weights,
                                         std::byte* lane);

}  // namespace flowprefill
