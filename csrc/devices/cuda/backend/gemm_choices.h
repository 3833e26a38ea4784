// GemmShape, GemmDevice and GemmChoices: what a choice of GEMM kernel depends on, and the measured
// choices with their file. Used by GemmSelector.
#pragma once

#include <array>
#include <compare>
#include <cstdint>
#include <map>
#include <string>

#include "devices/cuda/kernels/gemm_args.h"

namespace flowprefill {

// What measured times are of. Times of another device or version are worth nothing here.
struct GemmDevice {
  int compute_capability = 0;  // major * 10 + minor
  int num_multiprocessors = 0;
  std::string name = {};
  int driver_version = 0;      // as cudaDriverGetVersion() has it
  int runtime_version = 0;     // as cudaRuntimeGetVersion() has it
  std::string libraries = {};  // versions of the libraries among the candidates
};

// The rows that a choice is made for, by the rows of the whole operator: few and many sequences
// that decode, short prompts and everything else. Few, so that batches of other sizes get the same
// bits; but an algorithm for 512 rows takes 1.4 times as long for 256 as one for these (H200).
inline constexpr std::array<int32_t, 6> kRowClasses = {kMostFewRows, 64, 128, 256, 512, 2048};

// Products with equal shapes share a choice; slices of one operator have equal shapes.
struct GemmShape {
  int32_t rows = 0;     // of kRowClasses, the first that the whole operator's do not exceed
  int32_t columns = 0;  // of the whole operator
  int32_t depth = 0;
  GemmOutput output = GemmOutput::kFloat;
  bool has_bias = false;
  bool adds_to_d = false;
  bool is_gated = false;
  bool is_fp8 = false;

  auto operator<=>(const GemmShape&) const = default;
};

GemmShape shape_of(const GemmArgs& args);

// Name of the chosen candidate by shape.
using GemmChoices = std::map<GemmShape, std::string>;

// The choices in the file at `path` if it was written for `device`; none for a file that is
// missing, damaged, cut off or of another device or version. Throws nothing but std::bad_alloc.
GemmChoices read_gemm_choices(const std::string& path, const GemmDevice& device);

// Writes them in one step: a reader finds the old file or the new one. Throws std::runtime_error
// naming the path and the reason.
void write_gemm_choices(const std::string& path, const GemmDevice& device,
                        const GemmChoices& choices);

}  // namespace flowprefill
