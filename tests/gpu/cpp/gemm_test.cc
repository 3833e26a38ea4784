// Matrix products on the device: every tile the GPU has, with every epilogue; the selector with all
// its candidates, cuBLASLt included where it is installed.
//
// Operands of small whole numbers make every sum exact, whatever its order: there the result has to
// be equal to the bit. With normal numbers it is equal within rounding.
#include "device_test.h"
#include "devices/cuda/backend/gemm_candidates.h"
#include "devices/cuda/backend/gemm_cublas_lt.h"

namespace flowprefill::testing {
namespace {

struct Shape {
  int32_t rows = 200;
  int32_t columns = 136;
  int32_t depth = 72;
  GemmOutput output = GemmOutput::kFloat;
  bool has_bias = false;
  bool adds_to_d = false;
  bool is_gated = false;
  bool is_gelu = false;
  float scale = 1;
};

constexpr int32_t kGap = 8;

class Gemm : public DeviceTest {
 protected:
  // Rows before and behind the slice are there, and are not to be read or written.
  void make(const Shape& shape, bool is_whole) {
    forget();
    shape_ = shape;
    const auto a = static_cast<size_t>((shape.rows + 2) * (shape.depth + kGap));
    const auto b = static_cast<size_t>(shape.columns * (shape.depth + kGap));
    a_ = &add("a", is_whole ? whole_halves(a, 4) : halves(a));
    b_ = &add("b", is_whole ? whole_halves(b, 4) : halves(b, 0.3f));
    std::vector<float> bias = normals(static_cast<size_t>(shape.columns));
    for (float& value : bias)
      value = is_whole ? static_cast<float>(integer(-9, 9)) : value;
    bias_ = &add("bias", std::move(bias));
    const auto d = static_cast<size_t>(shape.rows + 2) * static_cast<size_t>(ldd());
    std::vector<float> residual = normals(d);
    for (float& value : residual)
      value = is_whole ? static_cast<float>(integer(-99, 99)) : value;
    floats_ = &add("d", std::move(residual));
    halves_ = &add("d in bf16", filled_halves(d));
  }

  int32_t d_columns() const { return shape_.is_gated ? shape_.columns / 2 : shape_.columns; }
  int64_t ldd() const { return d_columns() + kGap; }

  GemmArgs args(Place p) {
    const bool is_float = shape_.output == GemmOutput::kFloat;
    return {.a = a_->at(p),
            .lda = shape_.depth + kGap,
            .b = b_->at(p),
            .ldb = shape_.depth + kGap,
            .bias = shape_.has_bias ? bias_->at(p) : nullptr,
            .d = is_float ? static_cast<void*>(floats_->at(p)) : halves_->at(p),
            .ldd = ldd(),
            .output = shape_.output,
            .adds_to_d = shape_.adds_to_d,
            .is_gated = shape_.is_gated,
            .is_gelu = shape_.is_gelu,
            .scale = shape_.scale,
            .row_begin = 1,
            .row_end = 1 + shape_.rows,
            .columns = shape_.columns,
            .depth = shape_.depth};
  }

  std::vector<GemmTile> tiles() {
    return gemm_tiles(args(Place::kDevice), gpu_.compute_capability, gpu_.num_multiprocessors);
  }

  // Every partial sum rounds by at most 2^-24 of the sum of |a b|, on both sides, whatever the
  // order; bf16 rounds once more.
  void allow_rounding() {
    const double sums = 2 * shape_.depth * 0x1p-24;
    floats_->allow(sums, 1e-6, magnitudes());
    if (shape_.is_gated) {  // products of two sums; gate and up stay float in every tile
      halves_->allow(kOneStep, 2e-3);
    } else {
      std::vector<double> scale = magnitudes();
      for (size_t i = 0; i < scale.size(); ++i)
        scale[i] *= sums;
      halves_->allow(1.0, 0.0, with_own_rounding(std::move(scale)));
    }
  }

  // Sums of |a b| + |bias| + |d|, [rows + 2][ldd].
  std::vector<double> magnitudes() {
    for (auto* operand : {a_, b_}) {
      operand->host() = operand->initial();
      for (Bf16& value : operand->host())
        value &= 0x7fff;
    }
    bias_->host() = bias_->initial();
    floats_->host() = floats_->initial();
    for (auto* operand : {bias_, floats_}) {
      for (float& value : operand->host())
        value = std::abs(value);
    }
    GemmArgs bare = args(Place::kHost);
    bare.d = floats_->host().data();
    bare.output = GemmOutput::kFloat;
    bare.is_gated = false;
    if (!shape_.is_gated)
      fake_kernels::gemm(bare);
    return {floats_->host().begin(), floats_->host().end()};
  }

  // Adds two roundings to bf16 of the result itself to what each element may differ by.
  std::vector<double> with_own_rounding(std::vector<double> allowed) {
    for (auto* operand : {a_, b_})
      operand->host() = operand->initial();
    bias_->host() = bias_->initial();
    halves_->host() = halves_->initial();
    fake_kernels::gemm(args(Place::kHost));
    for (size_t i = 0; i < allowed.size(); ++i)
      allowed[i] += kOneStep * std::abs(widen(halves_->host()[i]));
    return allowed;
  }

  void expect_every_tile(const Shape& shape, bool is_whole) {
    make(shape, is_whole);
    if (!is_whole)
      allow_rounding();
    ASSERT_FALSE(tiles().empty());
    for (const GemmTile tile : tiles()) {
      SCOPED_TRACE(gemm_tile_name(tile));
      expect_kernel([&](cudaStream_t s) { return launch_gemm(args(Place::kDevice), tile, s); },
                    [&] { fake_kernels::gemm(args(Place::kHost)); });
    }
  }

  // The result's bits in rows [begin, end) of the slice, by a launch over just these.
  std::vector<std::byte> rows_of(GemmTile tile, int32_t begin, int32_t end) {
    const auto fetched = run([&](cudaStream_t s) {
      GemmArgs part = args(Place::kDevice);
      part.row_begin = 1 + begin;
      part.row_end = 1 + end;
      return launch_gemm(part, tile, s);
    });
    const auto row_bytes = static_cast<ptrdiff_t>(ldd() * 4);
    return {fetched[3].begin() + (1 + begin) * row_bytes,
            fetched[3].begin() + (1 + end) * row_bytes};
  }

  Shape shape_;
  Array<Bf16>* a_ = nullptr;
  Array<Bf16>* b_ = nullptr;
  Array<float>* bias_ = nullptr;
  Array<float>* floats_ = nullptr;  // the fourth operand
  Array<Bf16>* halves_ = nullptr;
};

TEST_F(Gemm, OfWholeNumbersIsExactInEveryEpilogue) {
  for (const GemmOutput output : {GemmOutput::kFloat, GemmOutput::kBf16}) {
    for (const bool has_bias : {false, true})
      expect_every_tile({.output = output, .has_bias = has_bias}, true);
  }
  expect_every_tile({.adds_to_d = true}, true);
  expect_every_tile({.has_bias = true, .adds_to_d = true}, true);
}

TEST_F(Gemm, AtTheEdgesOfTiles) {
  for (const int32_t rows : {1, 63, 64, 65, 129, 257}) {
    for (const int32_t columns : {8, 128, 264})
      expect_every_tile({.rows = rows, .columns = columns, .depth = 64}, true);
  }
  for (const int32_t depth : {8, 24, 32, 136, 520})
    expect_every_tile({.rows = 70, .columns = 72, .depth = depth}, true);
}

TEST_F(Gemm, OfEveryFewRows) {
  for (int32_t rows = 1; rows <= kMostFewRows; ++rows)
    expect_every_tile({.rows = rows, .columns = 72, .depth = 1112, .has_bias = true}, true);
}

TEST_F(Gemm, OfNormalNumbersIsEqualWithinRounding) {
  expect_every_tile({.depth = 576, .has_bias = true, .adds_to_d = true}, false);
  expect_every_tile({.depth = 576, .output = GemmOutput::kBf16, .has_bias = true}, false);
  expect_every_tile({.depth = 576, .has_bias = true, .adds_to_d = true, .scale = 0.25f}, false);
}

TEST_F(Gemm, GatedIsTheActivationOfOneProjectionTimesTheOther) {
  for (const bool is_second : {false, true}) {
    for (const int32_t columns : {16, 144, 3072 / (kIsDouble ? 8 : 1)}) {
      expect_every_tile({.rows = 90,
                         .columns = columns,
                         .depth = 192,
                         .output = GemmOutput::kBf16,
                         .has_bias = is_second,
                         .is_gated = true,
                         .is_gelu = is_second},
                        false);
    }
  }
}

// A row's sums run along depth alone, so the slice it is in changes nothing.
TEST_F(Gemm, RowsDoNotDependOnSlices) {
  make({.rows = 300, .columns = 264, .depth = 328, .has_bias = true, .adds_to_d = true}, false);
  for (const GemmTile tile : tiles()) {
    const std::vector<std::byte> want = rows_of(tile, 0, 300);
    const auto row_bytes = static_cast<ptrdiff_t>(ldd() * 4);
    for (const auto& [begin, end] : {std::pair{0, 1}, {1, 66}, {66, 194}, {194, 300}}) {
      const std::vector<std::byte> got = rows_of(tile, begin, end);
      EXPECT_TRUE(std::equal(got.begin(), got.end(), want.begin() + begin * row_bytes))
          << gemm_tile_name(tile) << ", rows " << begin << " to " << end;
    }
  }
}

class LargeGemm : public Gemm {
 protected:
  // Each row of a picks one column of b: exact, and the host need not multiply.
  void expect_picks(int32_t rows, int32_t columns, int32_t depth) {
    make({.rows = rows, .columns = columns, .depth = depth}, true);
    const int64_t ld = shape_.depth + kGap;
    std::fill(a_->initial().begin(), a_->initial().end(), Bf16{0});
    std::vector<float> want = floats_->initial();
    for (int32_t row = 1; row <= shape_.rows; ++row) {
      const int32_t pick = integer(0, shape_.depth - 1);
      a_->initial()[static_cast<size_t>(row * ld + pick)] = to_bf16(1.0f);
      for (int32_t column = 0; column < shape_.columns; ++column) {
        want[static_cast<size_t>(row * ldd() + column)] =
            widen(b_->initial()[static_cast<size_t>(column * ld + pick)]);
      }
    }
    for (const GemmTile tile : tiles()) {
      SCOPED_TRACE(std::string(gemm_tile_name(tile)) + ", rows " + std::to_string(rows));
      expect_kernel([&](cudaStream_t s) { return launch_gemm(args(Place::kDevice), tile, s); },
                    [&] { floats_->host() = want; });
    }
  }
};

TEST_F(LargeGemm, PicksTheRightElements) {
  const int32_t scale = kIsDouble ? 16 : 1;
  expect_picks(2500 / scale, 12288 / scale, 4096 / scale);
  for (const int32_t rows : {1, 16})  // blocks of few rows take columns in turn
    expect_picks(rows, 12296 / scale / 8 * 8, 4096 / scale);
}

// cuBLASLt's suggestions: those for few rows split the depth. Slices of rows and of columns, as
// preemption cuts them, have to have the bits of the whole for all of them.
class LibraryGemm : public Gemm {
 protected:
  // Where the double takes the runtime's place there is no library: our kernels are cut instead.
  std::shared_ptr<const CublasLt> load() {
    std::string reason;
    const std::vector<std::string> names = {"libcublasLt.so.13", "libcublasLt.so"};
    return kIsDouble ? nullptr : CublasLt::load(names, &reason);
  }

  // d's bits after the product in slices of so many rows and columns.
  template <typename Launch>
  std::vector<std::byte> cut(int32_t rows, int32_t columns, const Launch& launch) {
    return run([&](cudaStream_t s) {
      cudaError_t code = cudaSuccess;
      for (int32_t row = 0; row < shape_.rows; row += rows) {
        for (int32_t column = 0; column < shape_.columns; column += columns) {
          GemmArgs part = args(Place::kDevice);
          part.operator_rows = shape_.rows;
          part.operator_columns = shape_.columns;
          part.row_begin = 1 + row;
          part.row_end = 1 + std::min(row + rows, shape_.rows);
          part.columns = std::min(columns, shape_.columns - column);
          part.b += column * part.ldb;
          part.d = static_cast<float*>(part.d) + column;
          if (code == cudaSuccess)
            code = launch(part, s);
        }
      }
      return code;
    })[3];
  }

  template <typename Launch>
  void expect_same_bits(const Launch& launch) {
    const std::vector<std::byte> whole = cut(shape_.rows, shape_.columns, launch);
    EXPECT_TRUE(cut(1 + shape_.rows / 3, shape_.columns, launch) == whole) << "rows";
    EXPECT_TRUE(cut(shape_.rows, shape_.columns / 4, launch) == whole) << "columns";
    EXPECT_TRUE(cut(1, shape_.columns / 2, launch) == whole) << "both";
  }
};

TEST_F(LibraryGemm, SlicesHaveTheBitsOfTheWhole) {
  const auto library = load();
  const DeviceBuffer workspace(CublasLt::kWorkspaceBytes);
  const int32_t scale = kIsDouble ? 32 : 1;
  for (const int32_t rows : {5, 16, 40, 130}) {
    make({.rows = rows, .columns = 2048 / scale, .depth = 7168 / scale, .adds_to_d = true}, false);
    if (rows <= kMostFewRows) {
      expect_same_bits([](const GemmArgs& part, cudaStream_t s) {
        return launch_gemm(part, GemmTile::kFewRows, s);
      });
    }
    for (size_t i = 0; library != nullptr && i < CublasLt::kSuggestions; ++i) {
      const GemmArgs whole = args(Place::kDevice);
      try {
        library->prepare(whole, i);
      } catch (const std::runtime_error&) {
        break;  // no more suggestions
      }
      SCOPED_TRACE(std::to_string(rows) + " rows, " + library->config(whole, i));
      expect_same_bits([&](const GemmArgs& part, cudaStream_t s) {
        return library->launch(part, {workspace.get(), workspace.bytes()}, s, i);
      });
    }
  }
}

// ---- the selector

class Selector : public Gemm {
 protected:
  void expect_measured(const Shape& shape) {
    make(shape, false);
    allow_rounding();
    if (shape.is_gated)  // a pair of kernels rounds gate and up in between
      halves_->allow(4 * kBf16Rounding, 0.1);
    const GemmDevice device{.compute_capability = gpu_.compute_capability,
                            .num_multiprocessors = gpu_.num_multiprocessors,
                            .name = gpu_.name};
    std::string library_failure;
    const auto selector = make_gemm_selector(
        device, {.cublas_lt_libraries = {"libcublasLt.so.13", "libcublasLt.so"}}, &library_failure);
    const DeviceBuffer scratch(selector->scratch_bytes(args(Place::kDevice)));
    const std::span<std::byte> bytes(scratch.get(), scratch.bytes());
    const std::vector<GemmArgs> products = {args(Place::kDevice)};
    const auto launch = [&](cudaStream_t s) {
      selector->launch(args(Place::kDevice), bytes, s);
      return cudaSuccess;
    };
    expect_kernel(launch, [&] { fake_kernels::gemm(args(Place::kHost)); });  // the guess
    const auto reports = selector->measure_all(products, bytes, stream_.get());
    ASSERT_EQ(reports.size(), 1u);
    EXPECT_FALSE(reports[0].chosen.empty());
    for (const GemmTiming& timing : reports[0].timings) {
      const bool is_ours = timing.candidate.find("cublaslt") == std::string::npos;
      EXPECT_TRUE(timing.failure.empty() || !is_ours) << timing.candidate << ": " << timing.failure;
    }
    expect_kernel(launch, [&] { fake_kernels::gemm(args(Place::kHost)); });  // the choice
  }
};

TEST_F(Selector, GuessAndChoiceComputeTheSame) {
  const int32_t rows = kIsDouble ? 10 : 130;
  const int32_t columns = kIsDouble ? 16 : 1040;
  expect_measured(
      {.rows = rows, .columns = columns, .depth = 64, .has_bias = true, .adds_to_d = true});
  expect_measured({.rows = 3, .columns = columns, .depth = 64, .output = GemmOutput::kBf16});
  expect_measured({.rows = rows,
                   .columns = columns,
                   .depth = 64,
                   .output = GemmOutput::kBf16,
                   .is_gated = true,
                   .is_gelu = true});
  expect_measured({.rows = 3, .columns = columns, .depth = 64, .scale = 0.125f});
}

}  // namespace
}  // namespace flowprefill::testing
