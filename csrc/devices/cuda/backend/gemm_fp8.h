// fp8_candidates(): the ways to compute a product whose weights are e4m3. Called by
// gemm_candidates.cc, whose GemmSelector picks one.
#pragma once

#include <memory>
#include <vector>

#include "devices/cuda/backend/gemm_cublas_lt.h"
#include "devices/cuda/backend/gemm_selector.h"

namespace flowprefill {

// Each quantises the rows first (launch_quantise), by each row alone, then multiplies e4m3 by e4m3,
// so all err alike and slices have the bits of the whole. Best guess first:
// - cuBLASLt 12.9 or later with a scale for each row and column: compute capability 9.0;
// - cuBLASLt without scales into float, then launch_rescale: compute capability 8.9 and later;
// - the tiles of bf16, which has every e4m3 exactly, then launch_rescale. Slow: it is for libraries
//   that are missing or refuse, and for the tests.
// library: null: it is missing. args.is_fp8() holds.
std::vector<GemmCandidate> fp8_candidates(const GemmArgs& args, const GemmDevice& device,
                                          const std::shared_ptr<const CublasLt>& library);

}  // namespace flowprefill
