// make_gemm_selector(): the GemmSelector of the real kernels. Called by CudaBackend. Needs the
// kernels of csrc/devices/cuda/kernels (or a double of their launches) at link time; GemmSelector
// itself does not.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "devices/cuda/backend/gemm_selector.h"

namespace flowprefill {

struct GemmOptions {
  std::string cache_path = {};  // see GemmSelector
  // cuBLASLt to load as a further candidate: paths, or names for the dynamic linker; the first that
  // loads is used. Empty: none.
  std::vector<std::string> cublas_lt_libraries = {};
};

// Uses the current device. Never fails for want of a library: then its candidates are absent, and
// *library_failure says why (empty: it is there).
std::unique_ptr<GemmSelector> make_gemm_selector(GemmDevice device, const GemmOptions& options,
                                                 std::string* library_failure = nullptr);

}  // namespace flowprefill
