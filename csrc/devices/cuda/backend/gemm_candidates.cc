#include "devices/cuda/backend/gemm_candidates.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "devices/cuda/backend/gemm_cublas_lt.h"
#include "devices/cuda/backend/gemm_fp8.h"
#include "devices/cuda/kernels/expect.h"
#include "devices/cuda/kernels/kernels.h"

namespace flowprefill {
namespace {

// Raise it when a kernel of csrc/devices/cuda/kernels changes its speed: older measurements are
// void then.
constexpr const char* kKernels = "kernels 5";

// Whether our kernel for few rows comes before cuBLASLt. On an H200 the products of a layer of 8B
// take 141 us for one row, cuBLASLt's 150; for 16 rows 152 and 150.
constexpr bool kFewRowsFirst = true;

// Gate and up lie in scratch between GEMM and gate, at most so much of them at once.
constexpr int64_t kMaxGateUpBytes = int64_t{256} << 20;

int32_t rows_at_once(const GemmArgs& args) {
  const int64_t row_bytes = int64_t{args.whole_columns()} * 2;
  return static_cast<int32_t>(std::min<int64_t>(
      args.rows(), std::max<int64_t>(kMaxGateUpBytes / row_bytes / 256 * 256, 256)));
}

// Rounded up, so that what follows in scratch is aligned as libraries want their workspace.
size_t gate_up_bytes(const GemmArgs& args) {
  const size_t bytes =
      static_cast<size_t>(rows_at_once(args)) * static_cast<size_t>(args.whole_columns()) * 2;
  return (bytes + 255) / 256 * 256;
}

// Strides and what kernels are chosen by are those of the whole operator.
GemmArgs without_gate(GemmArgs args) {
  args.is_gated = false;
  args.operator_rows = args.whole_rows();
  args.ldd = args.whole_columns();
  return args;
}

using Launch = std::function<cudaError_t(const GemmArgs&, std::span<std::byte>, cudaStream_t)>;

// Gate and up by `gemm` into scratch, rounded to bf16 there, then the gate.
cudaError_t launch_in_two(const Launch& gemm, const GemmArgs& args, std::span<std::byte> scratch,
                          cudaStream_t stream) {
  check(args);
  const size_t bytes = gate_up_bytes(args);
  expect(scratch.size() >= bytes, "scratch bytes", static_cast<int64_t>(scratch.size()),
         "at least scratch_bytes() of these arguments");
  cudaError_t code = cudaSuccess;
  for (int32_t row = args.row_begin; row < args.row_end && code == cudaSuccess;) {
    const int32_t rows = std::min(rows_at_once(args), args.row_end - row);
    GemmArgs part = without_gate(args);
    part.a = args.a + row * args.lda;
    part.d = scratch.data();
    part.row_begin = 0;
    part.row_end = rows;
    code = gemm(part, scratch.subspan(bytes), stream);
    if (code != cudaSuccess)
      break;
    code = launch_gate(GateArgs<Bf16>{.in = reinterpret_cast<const Bf16*>(scratch.data()),
                                      .ld_in = part.ldd,
                                      .out = static_cast<Bf16*>(args.d) + row * args.ldd,
                                      .ld_out = args.ldd,
                                      .rows = rows,
                                      .width = args.d_columns(),
                                      .is_gelu = args.is_gelu},
                       stream);
    row += rows;
  }
  return code;
}

GemmCandidate of_tile(GemmTile tile) {
  return {.name = gemm_tile_name(tile),
          .scratch_bytes = 0,
          .launch = [tile](const GemmArgs& args, std::span<std::byte>, cudaStream_t stream) {
            return launch_gemm(args, tile, stream);
          }};
}

GemmCandidate in_two(GemmCandidate gemm, const GemmArgs& args) {
  GemmCandidate both = {
      .name = gemm.name + " + gate",
      .scratch_bytes = gemm.scratch_bytes + gate_up_bytes(args),
      .launch = [launch = std::move(gemm.launch)](
                    const GemmArgs& gated, std::span<std::byte> scratch,
                    cudaStream_t stream) { return launch_in_two(launch, gated, scratch, stream); },
      .num_kernels =
          [](const GemmArgs& gated) {
            const int32_t step = rows_at_once(gated);
            return 2 * ((gated.rows() + step - 1) / step);
          }};
  if (gemm.prepare) {
    both.prepare = [prepare = std::move(gemm.prepare)](const GemmArgs& gated) {
      prepare(without_gate(gated));
    };
  }
  return both;
}

GemmCandidate of_library(const std::shared_ptr<const CublasLt>& library) {
  return {
      .name = "cublaslt",
      .scratch_bytes = CublasLt::kWorkspaceBytes,
      .launch = [library](const GemmArgs& args, std::span<std::byte> scratch,
                          cudaStream_t stream) { return library->launch(args, scratch, stream); },
      .prepare = [library](const GemmArgs& args) { library->prepare(args); }};
}

class Candidates {
 public:
  Candidates(const GemmDevice& device, std::shared_ptr<const CublasLt> library)
      : device_(device), library_(std::move(library)) {}

  std::vector<GemmCandidate> operator()(const GemmArgs& args) const {
    if (args.is_fp8())
      return fp8_candidates(args, device_, library_);
    std::vector<GemmCandidate> out;
    if (library_ != nullptr && CublasLt::takes(args))
      out.push_back(of_library(library_));
    for (const GemmTile tile : tiles(args))
      out.push_back(of_tile(tile));
    if (args.is_gated)
      add_pairs(args, &out);
    const auto few = std::ranges::find(out, kFewRowsName, &GemmCandidate::name);
    if (kFewRowsFirst && few != out.end())
      std::rotate(out.begin(), few, few + 1);
    return out;
  }

 private:
  std::vector<GemmTile> tiles(const GemmArgs& args) const {
    return gemm_tiles(args, device_.compute_capability, device_.num_multiprocessors);
  }

  // The fused kernels have mma.sync only. Where the guess for the bare product is of a faster kind,
  // that one and a gate are guessed to be faster too. The fused kernel for few rows needs no pair.
  void add_pairs(const GemmArgs& args, std::vector<GemmCandidate>* out) const {
    std::vector<GemmCandidate> bare = (*this)(without_gate(args));
    std::erase_if(bare, [this](const GemmCandidate& c) { return c.name == kFewRowsName; });
    const bool has_faster_kind =
        !bare.empty() && (bare.front().name == "cublaslt" ||
                          bare.front().name == gemm_tile_name(GemmTile::kHopper128x256));
    for (size_t i = 0; i < bare.size(); ++i) {
      GemmCandidate both = in_two(std::move(bare[i]), args);
      out->insert(i == 0 && has_faster_kind ? out->begin() : out->end(), std::move(both));
    }
  }

  const std::string kFewRowsName = gemm_tile_name(GemmTile::kFewRows);

  GemmDevice device_;
  std::shared_ptr<const CublasLt> library_;
};

}  // namespace

std::unique_ptr<GemmSelector> make_gemm_selector(GemmDevice device, const GemmOptions& options,
                                                 std::string* library_failure) {
  std::string reason;
  std::shared_ptr<const CublasLt> library = CublasLt::load(options.cublas_lt_libraries, &reason);
  device.libraries = kKernels;
  if (library != nullptr)
    device.libraries += ", " + library->version();
  if (library_failure != nullptr)
    *library_failure = reason;
  const std::string& path = options.cache_path;
  return std::make_unique<GemmSelector>(device, path, Candidates(device, std::move(library)));
}

}  // namespace flowprefill
