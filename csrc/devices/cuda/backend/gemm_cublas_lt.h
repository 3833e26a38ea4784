// CublasLt: matrix products by NVIDIA's cuBLASLt, loaded at run time if it is there. A candidate of
// GemmSelector, made by gemm_candidates.cc. Nothing links the library; where its public header was
// missing when this was compiled, load() always says so.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>

#include "devices/cuda/kernels/gemm_args.h"

namespace flowprefill {

class CublasLt {
 public:
  // Device memory that launch() may write; what NVIDIA recommends for compute capability 9.0. Its
  // address is a multiple of kWorkspaceAlignment, as the library demands.
  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;
  static constexpr size_t kWorkspaceAlignment = 256;
  // Products prepared at most: each keeps descriptors and an algorithm. A model has some dozens:
  // slices share those of their operator.
  static constexpr size_t kMaxProducts = 1024;
  // Algorithms that the library is asked for; fewer may be there.
  static constexpr size_t kSuggestions = 8;

  // Loads the first of `libraries` (paths, or names for the dynamic linker) that can be used on the
  // current device. Null, and why in *reason, if there is none. Once loaded it stays loaded.
  static std::shared_ptr<const CublasLt> load(std::span<const std::string> libraries,
                                              std::string* reason);
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  // "cublaslt 130000"
  const std::string& version() const { return version_; }

  // Whether FP8 products may have a scale for each row and column (12.9, on devices of compute
  // capability 9.0 that is); a product whose a_scales are null has neither.
  bool has_outer_scales() const { return has_outer_scales_; }

  // No gate; a bias only where d is float, because it has d's type there. FP8: no bias, and rows
  // that are quantised already.
  static bool takes(const GemmArgs& args);

  // Asks the library for algorithms for the operator that these are a slice of, by its class of
  // rows (shape_of()), unless that is known, and keeps one of those that take one row and the most:
  // suggestion 0 is what the library holds to be the fastest. Up to a millisecond. launch() takes
  // any slice of such an operator. Throws as launch(), and std::runtime_error beyond kMaxProducts
  // or where there is no such suggestion. Thread: any; no launch() waits for the library's answer.
  void prepare(const GemmArgs& args, size_t suggestion = 0) const;

  // As launch_gemm(). One algorithm for all slices of an operator, which splits the depth in a
  // fixed way or not at all: an element's bits depend on its row and column alone. `workspace` is
  // written, so it belongs to one stream at a time. Throws std::invalid_argument as check(), and
  // std::runtime_error naming call and status where the library refuses, or if it was not prepared.
  // Thread: any, one at a time inside.
  cudaError_t launch(const GemmArgs& args, std::span<std::byte> workspace, cudaStream_t stream,
                     size_t suggestion = 0) const;

  // The prepared algorithm in the numbers of cublasLt.h, e.g. "algorithm 66 tile 15 stages 20
  // split 4 scheme 2 ... workspace 2097152". Throws as launch().
  std::string config(const GemmArgs& args, size_t suggestion = 0) const;

 private:
  struct Library;

  CublasLt(std::unique_ptr<Library> library, size_t version);

  const std::unique_ptr<Library> library_;
  const std::string version_;
  const bool has_outer_scales_;
};

}  // namespace flowprefill
