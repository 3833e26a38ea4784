#include "devices/cuda/backend/gemm_fp8.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "devices/cuda/kernels/expect.h"
#include "devices/cuda/kernels/kernels.h"

namespace flowprefill {
namespace {

// Rows and their sums lie in scratch, at most so much of them at once; of widened weights a
// quarter.
constexpr int64_t kMaxRowBytes = int64_t{256} << 20;
constexpr int64_t kMaxWeightBytes = int64_t{64} << 20;

// Whether our kernel for few rows comes before cuBLASLt. On an H200 the products of a layer of 8B
// and one row take 96 us, cuBLASLt's best 112.
constexpr bool kFewRowsFirst = true;

// Gives out scratch, each piece aligned as libraries want their workspace.
class Scratch {
 public:
  explicit Scratch(std::byte* begin) : begin_(begin) {}

  template <typename T>
  T* take(int64_t count) {
    std::byte* piece = begin_ + used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(piece);
  }
  size_t used() const { return used_; }

 private:
  std::byte* begin_;
  size_t used_ = 0;
};

int32_t whole_multiple(int64_t count, int32_t step, int32_t most) {
  return static_cast<int32_t>(std::min<int64_t>(most, std::max<int64_t>(count / step, 1) * step));
}

int32_t parts_of(int32_t count, int32_t step) {
  return (count + step - 1) / step;
}

// Codes and sums, and room for the same rows in bf16.
int32_t rows_at_once(const GemmArgs& args) {
  const int64_t row_bytes = 3 * int64_t{args.depth} + 4 * int64_t{args.whole_columns()};
  return whole_multiple(kMaxRowBytes / row_bytes, 256, args.rows());
}

// The same for every slice of an operator.
int32_t columns_at_once(const GemmArgs& args) {
  return whole_multiple(kMaxWeightBytes / (2 * int64_t{args.depth}), 64, args.whole_columns());
}

// The pieces of scratch of one product.
struct Pieces {
  Pieces(const GemmArgs& args, std::byte* begin, bool widens, size_t workspace_bytes) {
    Scratch scratch(begin);
    const int64_t rows = rows_at_once(args);
    workspace = scratch.take<std::byte>(static_cast<int64_t>(workspace_bytes));
    codes = scratch.take<E4m3>(rows * args.depth);
    scales = scratch.take<float>(rows);
    sums = scratch.take<float>(rows * args.whole_columns());
    if (widens) {
      wide_rows = scratch.take<Bf16>(rows * args.depth);
      wide_weights = scratch.take<Bf16>(int64_t{columns_at_once(args)} * args.depth);
    }
    bytes = scratch.used();
  }

  std::byte* workspace = nullptr;
  E4m3* codes = nullptr;
  float* scales = nullptr;
  float* sums = nullptr;
  Bf16* wide_rows = nullptr;
  Bf16* wide_weights = nullptr;
  size_t bytes = 0;
};

// A row's codes lie without gaps, and its sums.
GemmArgs of_codes(GemmArgs args, const Pieces& pieces) {
  args.operator_rows = args.whole_rows();
  args.operator_columns = args.whole_columns();
  args.fp8.a = pieces.codes;
  args.lda = args.depth;
  args.row_begin = 0;
  return args;
}

// The product alone, into float sums.
GemmArgs into_sums(const GemmArgs& args, const Pieces& pieces) {
  GemmArgs sums = of_codes(args, pieces);
  sums.bias = nullptr;
  sums.d = pieces.sums;
  sums.ldd = args.whole_columns();
  sums.output = GemmOutput::kFloat;
  sums.adds_to_d = false;
  sums.is_gated = false;
  sums.scale = 1;
  return sums;
}

// What is written to d by the product itself.
GemmArgs with_outer_scales(const GemmArgs& args, const Pieces& pieces) {
  GemmArgs scaled = of_codes(args, pieces);
  scaled.fp8.a_scales = pieces.scales;
  return scaled;
}

bool has_plain_epilogue(const GemmArgs& args) {
  return !args.is_gated && args.bias == nullptr;
}

cudaError_t quantise(const GemmArgs& args, int32_t row, int32_t rows, const Pieces& to,
                     cudaStream_t stream) {
  return launch_quantise({.in = args.a + row * args.lda,
                          .ld_in = args.lda,
                          .out = to.codes,
                          .ld_out = args.depth,
                          .scales = to.scales,
                          .rows = rows,
                          .width = args.depth},
                         stream);
}

void* d_at(const GemmArgs& args, int32_t row) {
  if (args.output == GemmOutput::kFloat)
    return static_cast<float*>(args.d) + row * args.ldd;
  return static_cast<Bf16*>(args.d) + row * args.ldd;
}

cudaError_t rescale(const GemmArgs& args, int32_t row, int32_t rows, const Pieces& from,
                    cudaStream_t stream) {
  return launch_rescale({.in = from.sums,
                         .ld_in = args.whole_columns(),
                         .row_scales = from.scales,
                         .column_scales = args.fp8.b_scales,
                         .bias = args.bias,
                         .out = d_at(args, row),
                         .ld_out = args.ldd,
                         .output = args.output,
                         .adds_to_out = args.adds_to_d,
                         .is_gated = args.is_gated,
                         .is_gelu = args.is_gelu,
                         .scale = args.scale,
                         .rows = rows,
                         .columns = args.columns},
                        stream);
}

// Codes times codes into sums, by a kernel of bf16 over some columns after the other.
cudaError_t multiply_widened(GemmTile tile, const GemmArgs& sums, const Pieces& pieces,
                             cudaStream_t stream) {
  const int32_t depth = sums.depth;
  cudaError_t code = launch_widen({.in = pieces.codes,
                                   .ld_in = depth,
                                   .out = pieces.wide_rows,
                                   .ld_out = depth,
                                   .rows = sums.rows(),
                                   .width = depth},
                                  stream);
  const int32_t step = columns_at_once(sums);
  for (int32_t begin = 0; begin < sums.columns && code == cudaSuccess; begin += step) {
    GemmArgs part = sums;
    part.columns = std::min(step, sums.columns - begin);
    code = launch_widen({.in = sums.fp8.b + begin * sums.ldb,
                         .ld_in = sums.ldb,
                         .out = pieces.wide_weights,
                         .ld_out = depth,
                         .rows = part.columns,
                         .width = depth},
                        stream);
    part.fp8 = {};
    part.a = pieces.wide_rows;
    part.b = pieces.wide_weights;
    part.b_is_made = true;
    part.ldb = depth;
    part.d = pieces.sums + begin;
    if (code == cudaSuccess)
      code = launch_gemm(part, tile, stream);
  }
  return code;
}

// One way to multiply rows of codes by the weights.
struct CodeProduct {
  // Multiplies the codes in `pieces`, of `rows` rows from `row` on.
  using Multiply = std::function<cudaError_t(const GemmArgs&, const Pieces& pieces, int32_t row,
                                             int32_t rows, cudaStream_t)>;

  std::string name = {};
  bool widens = false;    // wants the pieces for codes in bf16
  bool rescales = false;  // leaves sums, without scales and epilogue; else it writes d
  size_t workspace_bytes = 0;
  Multiply multiply = {};
  std::function<int32_t(const GemmArgs&)> num_kernels = {};  // of one multiply(); empty: one
  std::function<void(const GemmArgs&)> prepare = {};
};

// Where nothing is launched yet, addresses stand for any.
Pieces nowhere(const GemmArgs& args, bool widens, size_t workspace_bytes) {
  return {args, reinterpret_cast<std::byte*>(uintptr_t{1} << 30), widens, workspace_bytes};
}

// Rows to codes, their product, and what follows it, for as many rows at a time as scratch has
// room.
cudaError_t launch_parts(const CodeProduct& product, const GemmArgs& args,
                         std::span<std::byte> scratch, cudaStream_t stream) {
  check(args);
  const Pieces pieces(args, scratch.data(), product.widens, product.workspace_bytes);
  expect(scratch.size() >= pieces.bytes, "scratch bytes", static_cast<int64_t>(scratch.size()),
         "at least scratch_bytes() of these arguments");
  const int32_t step = rows_at_once(args);
  cudaError_t code = cudaSuccess;
  for (int32_t row = args.row_begin; row < args.row_end && code == cudaSuccess; row += step) {
    const int32_t rows = std::min(step, args.row_end - row);
    code = quantise(args, row, rows, pieces, stream);
    if (code == cudaSuccess)
      code = product.multiply(args, pieces, row, rows, stream);
    if (code == cudaSuccess && product.rescales)
      code = rescale(args, row, rows, pieces, stream);
  }
  return code;
}

int32_t num_kernels(const CodeProduct& product, const GemmArgs& args) {
  const int32_t multiplies = product.num_kernels ? product.num_kernels(args) : 1;
  return parts_of(args.rows(), rows_at_once(args)) * (1 + multiplies + (product.rescales ? 1 : 0));
}

GemmCandidate candidate_of(CodeProduct product, const GemmArgs& shape) {
  const auto shared = std::make_shared<const CodeProduct>(std::move(product));
  return {.name = shared->name,
          .scratch_bytes = nowhere(shape, shared->widens, shared->workspace_bytes).bytes,
          .launch =
              [shared](const GemmArgs& args, std::span<std::byte> scratch, cudaStream_t stream) {
                return launch_parts(*shared, args, scratch, stream);
              },
          .prepare = shared->prepare,
          .num_kernels = [shared](const GemmArgs& args) { return num_kernels(*shared, args); }};
}

CodeProduct by_library(const std::shared_ptr<const CublasLt>& library, bool has_outer_scales) {
  constexpr size_t kWorkspace = CublasLt::kWorkspaceBytes;
  const auto of_rows = has_outer_scales ? with_outer_scales : into_sums;
  return {.name = has_outer_scales ? "cublaslt fp8, scales" : "cublaslt fp8 + rescale",
          .rescales = !has_outer_scales,
          .workspace_bytes = kWorkspace,
          .multiply =
              [=](const GemmArgs& args, const Pieces& pieces, int32_t row, int32_t rows,
                  cudaStream_t stream) {
                GemmArgs part = of_rows(args, pieces);
                part.row_end = rows;
                if (has_outer_scales)
                  part.d = d_at(args, row);
                return library->launch(part, {pieces.workspace, kWorkspace}, stream);
              },
          .prepare =
              [=](const GemmArgs& args) {
                GemmArgs whole = of_rows(args, nowhere(args, false, kWorkspace));
                whole.row_end = args.rows();
                library->prepare(whole);
              }};
}

CodeProduct by_few_rows() {
  return {.name = std::string("fp8 ") + gemm_tile_name(GemmTile::kFewRows),
          .multiply = [](const GemmArgs& args, const Pieces& pieces, int32_t row, int32_t rows,
                         cudaStream_t stream) {
            GemmArgs part = with_outer_scales(args, pieces);
            part.row_end = rows;
            part.d = d_at(args, row);
            return launch_gemm(part, GemmTile::kFewRows, stream);
          }};
}

CodeProduct by_tile(GemmTile tile) {
  return {.name = std::string("fp8 widened, ") + gemm_tile_name(tile),
          .widens = true,
          .rescales = true,
          .multiply =
              [tile](const GemmArgs& args, const Pieces& pieces, int32_t, int32_t rows,
                     cudaStream_t stream) {
                GemmArgs sums = into_sums(args, pieces);
                sums.row_end = rows;
                return multiply_widened(tile, sums, pieces, stream);
              },
          .num_kernels =
              [](const GemmArgs& args) {
                return 1 + 2 * parts_of(args.columns, columns_at_once(args));
              }};
}

}  // namespace

std::vector<GemmCandidate> fp8_candidates(const GemmArgs& args, const GemmDevice& device,
                                          const std::shared_ptr<const CublasLt>& library) {
  std::vector<GemmCandidate> out;
  if (library != nullptr && device.compute_capability >= 89) {
    if (device.compute_capability == 90 && library->has_outer_scales() && has_plain_epilogue(args))
      out.push_back(candidate_of(by_library(library, true), args));
    out.push_back(candidate_of(by_library(library, false), args));
  }
  if (args.rows() <= kMostFewRows)
    out.insert(kFewRowsFirst ? out.begin() : out.end(), candidate_of(by_few_rows(), args));
  const GemmArgs sums = into_sums(args, nowhere(args, true, 0));
  for (const GemmTile tile :
       gemm_tiles(sums, device.compute_capability, device.num_multiprocessors)) {
    if (tile != GemmTile::kFewRows)  // it needs no widening
      out.push_back(candidate_of(by_tile(tile), args));
  }
  return out;
}

}  // namespace flowprefill
