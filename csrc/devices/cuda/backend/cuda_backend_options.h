// CudaBackendOptions: sizes and limits of a model on a GPU. Given by csrc/bindings (by the fields'
// names) and by tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "devices/cuda/backend/cuda_cuts.h"
#include "graph/planner.h"

namespace flowprefill {

struct CudaBackendOptions {
  int device = 0;
  double spin_s = 50e-6;         // polls this long before it sleeps: see CudaDeviceOptions
  double anchor_s = 1;           // see CudaDeviceOptions
  int run_ahead = 1;             // segments the host may be ahead, 1 to 4
  bool launches_late = true;     // with run_ahead 1: see CudaDeviceOptions
  int32_t num_lanes = 2;         // runs whose activations stay on the device while suspended
  int32_t max_tokens = 8192;     // new tokens of the largest batch
  int32_t max_sequences = 256;   // of the largest batch
  int32_t max_context = 131072;  // tokens of the longest sequence, its new ones included
  std::vector<int32_t> buckets;  // ascending token counts that have graphs; empty: default_buckets
  bool has_graphs = true;        // false: every segment is launched eagerly
  size_t graph_bytes = size_t{1} << 30;         // device memory of executables at most
  size_t device_spill_bytes = size_t{1} << 30;  // of suspended runs without a lane; then the host's
  int32_t warm_tokens = 256;  // make_device() captures the buckets up to this ahead of time
  // make_device() measures the GEMM kernels unless the cache knows. Where cuBLASLt is loaded its
  // own choice is taken unmeasured, so that bits do not depend on timings, or measures_cublas_lt.
  bool measures_gemms = false;
  bool measures_cublas_lt = false;
  std::string gemm_cache_path;                   // file of measured GEMM choices; empty: none
  std::vector<std::string> cublas_lt_libraries;  // see GemmOptions
  // Which kernel computes the attention of many rows: "portable"; "hopper" (compute capability 9.0
  // and head sizes 64, 128 and 256 only); "auto": hopper's where it can.
  std::string attention = "auto";
  // Products whose weights stay in e4m3, a scale for each row of them, and whose rows are quantised
  // too: all of the layers; and those all of whose tensors come so, by load_blocks(). Sides are
  // multiples of 16; all else is bf16.
  bool quantizes_fp8 = false;
  std::vector<std::string> fp8_sources;
  CutRules cuts = kCudaCuts;
};

// With the buckets filled in. Throws std::invalid_argument naming the field, its value and what is
// allowed.
CudaBackendOptions checked(CudaBackendOptions options);

}  // namespace flowprefill
