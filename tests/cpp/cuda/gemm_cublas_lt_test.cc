// CublasLt against a library of its functions that multiplies as the descriptors say
// (fake_cublas_lt.cc, FAKE_CUBLAS_LT is its path).
#include "devices/cuda/backend/gemm_cublas_lt.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <vector>

#include "devices/cuda/backend/gemm_candidates.h"
#include "devices/cuda/kernels/kernels.h"
#include "plain_kernels.h"

namespace flowprefill {

// In place of csrc/devices/cuda/kernels: at once and on the host, as the library here.
template <typename Args>
cudaError_t at_once(const Args& args, void (*kernel)(const Args&)) {
  check(args);
  kernel(args);
  return cudaSuccess;
}
cudaError_t launch_quantise(const QuantiseArgs& args, cudaStream_t) {
  return at_once(args, fake_kernels::quantise);
}
cudaError_t launch_widen(const WidenArgs& args, cudaStream_t) {
  return at_once(args, fake_kernels::widen_codes);
}
cudaError_t launch_rescale(const RescaleArgs& args, cudaStream_t) {
  return at_once(args, fake_kernels::rescale);
}
cudaError_t launch_gemm(const GemmArgs& args, GemmTile, cudaStream_t) {
  return at_once(args, fake_kernels::gemm);
}
template <>
cudaError_t launch_gate<Bf16>(const GateArgs<Bf16>& args, cudaStream_t) {
  return at_once(args, fake_kernels::gate<Bf16>);
}

namespace {

constexpr int kRows = 6, kColumns = 24, kDepth = 16;
constexpr int64_t kLda = 24, kLdb = 32, kLdd = 32;

template <typename T>
std::vector<T> waves(int64_t count, float speed) {
  std::vector<T> out(static_cast<size_t>(count));
  for (size_t i = 0; i < out.size(); ++i)
    store(std::sin(static_cast<float>(i) * speed), &out[i]);
  return out;
}

int counted(const char* name) {
  void* library = dlopen(FAKE_CUBLAS_LT, RTLD_NOW | RTLD_LOCAL);
  const int value = *static_cast<int*>(dlsym(library, name));
  dlclose(library);
  return value;
}

class CublasLtTest : public testing::Test {
 protected:
  std::shared_ptr<const CublasLt> load(std::vector<std::string> names = {FAKE_CUBLAS_LT}) {
    return CublasLt::load(names, &reason);
  }

  template <typename Output>
  void test(bool has_bias, bool adds_to_d) {
    const auto library = load();
    ASSERT_NE(library, nullptr) << reason;
    const auto a = waves<Bf16>(kRows * kLda, 0.7f);
    const auto b = waves<Bf16>(kColumns * kLdb, 1.3f);
    const auto bias = waves<float>(kColumns, 0.4f);
    auto d = waves<Output>(kRows * kLdd, 0.9f);
    const auto before = d;
    const GemmArgs args{.a = a.data(),
                        .lda = kLda,
                        .b = b.data(),
                        .ldb = kLdb,
                        .bias = has_bias ? bias.data() : nullptr,
                        .d = d.data(),
                        .ldd = kLdd,
                        .output = sizeof(Output) == 4 ? GemmOutput::kFloat : GemmOutput::kBf16,
                        .adds_to_d = adds_to_d,
                        .row_begin = 2,
                        .row_end = kRows,
                        .columns = kColumns,
                        .depth = kDepth};
    ASSERT_TRUE(CublasLt::takes(args));
    library->prepare(args);
    ASSERT_EQ(library->launch(args, workspace, nullptr), cudaSuccess);
    for (int row = 0; row < kRows; ++row) {
      for (int column = 0; column < kLdd; ++column) {
        const auto at = static_cast<size_t>(row * kLdd + column);
        if (row < 2 || column >= kColumns) {
          ASSERT_EQ(d[at], before[at]);
          continue;
        }
        double want = (has_bias ? bias[static_cast<size_t>(column)] : 0.0) +
                      (adds_to_d ? widen(before[at]) : 0.0);
        for (int k = 0; k < kDepth; ++k)
          want += widen(a[static_cast<size_t>(row * kLda + k)]) *
                  widen(b[static_cast<size_t>(column * kLdb + k)]);
        ASSERT_NEAR(widen(d[at]), want, sizeof(Output) == 4 ? 1e-4 : std::abs(want) / 200 + 1e-4);
      }
    }
  }

  static GemmArgs product(int32_t rows, int32_t columns = 64, int32_t depth = 64) {
    alignas(16) static Bf16 zeros[64 * 64] = {};
    alignas(16) static float d[64 * 64];
    return {.a = zeros,
            .lda = 64,
            .b = zeros,
            .ldb = 64,
            .d = d,
            .ldd = std::max(columns, 64),
            .row_end = rows,
            .columns = columns,
            .depth = depth};
  }

  std::string reason;
  std::vector<std::byte> memory =
      std::vector<std::byte>(CublasLt::kWorkspaceBytes + CublasLt::kWorkspaceAlignment);
  const std::span<std::byte> workspace = [this] {
    void* begin = memory.data();
    size_t space = memory.size();
    std::align(CublasLt::kWorkspaceAlignment, CublasLt::kWorkspaceBytes, begin, space);
    return std::span(static_cast<std::byte*>(begin), CublasLt::kWorkspaceBytes);
  }();
};

TEST_F(CublasLtTest, MultipliesASliceAsLaunchGemmDoes) {
  test<float>(false, false);
  test<float>(true, true);
  test<Bf16>(false, false);
  test<Bf16>(false, true);
}

TEST_F(CublasLtTest, AsksOncePerOperatorAndClassOfRowsBeforeTheLaunch) {
  const int asked = counted("fake_cublas_lt_asked");
  {
    const auto library = load();
    ASSERT_NE(library, nullptr);
    EXPECT_THROW(library->launch(product(5), workspace, nullptr), std::runtime_error)
        << "was not prepared";
    EXPECT_EQ(counted("fake_cublas_lt_asked") - asked, 0) << "a launch never asks";
    for (const int32_t rows : {17, 64, 40, 33})
      library->prepare(product(rows));
    EXPECT_EQ(counted("fake_cublas_lt_asked") - asked, 1);
    EXPECT_EQ(counted("fake_cublas_lt_rows"), 64);
    for (const int32_t rows : {17, 64, 40, 33})
      EXPECT_EQ(library->launch(product(rows), workspace, nullptr), cudaSuccess);
    GemmArgs slice = product(5);
    slice.operator_rows = 3000;
    EXPECT_THROW(library->launch(slice, workspace, nullptr), std::runtime_error);
    library->prepare(slice);
    EXPECT_EQ(counted("fake_cublas_lt_rows"), 2048);
    EXPECT_EQ(counted("fake_cublas_lt_asked") - asked, 2);
    library->prepare(product(16));
    EXPECT_EQ(counted("fake_cublas_lt_rows"), 16);
    EXPECT_THROW(library->prepare(product(5, 64, 8)), std::runtime_error)
        << "nothing for a depth of 8";
    slice.depth = 24;
    EXPECT_THROW(library->prepare(slice), std::runtime_error) << "131,072 rows want 128 MiB";
    library->prepare(product(5, 64, 24));
  }
  EXPECT_EQ(counted("fake_cublas_lt_live"), 0);
}

TEST_F(CublasLtTest, TakesTheSuggestionThatIsNamedAmongThoseThatRunAllSlices) {
  const auto library = load();
  ASSERT_NE(library, nullptr) << reason;
  const auto split = [&](const GemmArgs& args, size_t suggestion) {
    library->prepare(args, suggestion);
    EXPECT_EQ(library->launch(args, workspace, nullptr, suggestion), cudaSuccess);
    const std::string config = library->config(args, suggestion);
    return config.substr(config.find("split"), 7);
  };
  for (const auto& [suggestion, parts] : {std::pair{0, "split 2"}, {2, "split 8"}, {1, "split 4"}})
    EXPECT_EQ(split(product(5), static_cast<size_t>(suggestion)), parts);
  EXPECT_THROW(library->prepare(product(5), 3), std::runtime_error) << "there are three";
  EXPECT_THROW(library->config(product(5), 3), std::runtime_error) << "was not prepared";
  const GemmArgs refused = product(5, 64, 40);
  EXPECT_EQ(split(refused, 0), "split 4") << "no two parts of a depth of 40";
  EXPECT_EQ(split(refused, 1), "split 8");
  EXPECT_THROW(library->prepare(refused, 2), std::runtime_error);
}

// The library's algorithms sum in different orders here; slices of one operator do not.
TEST_F(CublasLtTest, SlicesOfAnOperatorHaveTheBitsOfTheWhole) {
  constexpr int32_t rows = 700, columns = 128, depth = 64;
  const auto library = load();
  ASSERT_NE(library, nullptr) << reason;
  const auto a = waves<Bf16>(rows * depth, 0.7f);
  const auto b = waves<Bf16>(columns * depth, 1.3f);
  std::vector<float> whole(rows * columns), cut(rows * columns), alone(rows * columns);
  const auto run = [&](std::vector<float>& d, GemmArgs args) {
    const int64_t column = (args.b - b.data()) / depth;
    args.a = a.data();
    args.lda = args.ldb = args.depth = depth;
    args.d = d.data() + column;
    args.ldd = columns;
    library->prepare(args);
    ASSERT_EQ(library->launch(args, workspace, nullptr), cudaSuccess);
  };
  run(whole, {.b = b.data(), .row_end = rows, .columns = columns});
  for (const auto& [begin, end] : {std::pair{0, 1}, {1, 65}, {65, 600}, {600, 700}}) {
    for (int32_t column = 0; column < columns; column += 64) {
      run(cut, {.b = b.data() + column * depth,
                .row_begin = begin,
                .row_end = end,
                .columns = 64,
                .operator_rows = rows,
                .operator_columns = columns});
    }
    run(alone, {.b = b.data(), .row_begin = begin, .row_end = end, .columns = columns});
  }
  EXPECT_EQ(cut, whole);
  EXPECT_NE(alone, whole) << "by algorithms of their own";
}

// FP8 by each way: with the library's scales, with ours after it, and by the tiles of bf16.
class CublasLtFp8 : public CublasLtTest {
 protected:
  static constexpr int32_t rows = 70, columns = 192, depth = 64, ldd = 200;

  CublasLtFp8() {
    for (size_t i = 0; i < codes.size(); ++i)
      codes[i] = to_e4m3(200 * std::sin(static_cast<float>(i) * 0.37f));
    for (size_t i = 0; i < scales.size(); ++i)
      scales[i] = 0.001f * static_cast<float>(1 + i % 7);
  }

  GemmArgs product(bool is_gated, bool adds_to_d) {
    return {.a = a.data(),
            .lda = depth,
            .fp8 = {.b = codes.data(), .b_scales = scales.data()},
            .ldb = depth,
            .d = is_gated ? static_cast<void*>(halves.data()) : floats.data(),
            .ldd = ldd,
            .output = is_gated ? GemmOutput::kBf16 : GemmOutput::kFloat,
            .adds_to_d = adds_to_d,
            .is_gated = is_gated,
            .scale = is_gated ? 1.0f : 0.5f,
            .row_end = rows,
            .columns = columns,
            .depth = depth,
            .operator_rows = rows,
            .operator_columns = columns};
  }

  // d after the product, whole or in slices of rows and columns, from the same start.
  std::vector<float> result(const GemmSelector& gemms, const GemmArgs& whole, bool is_cut) {
    std::ranges::fill(halves, to_bf16(0.5f));
    std::ranges::fill(floats, 0.5f);
    std::vector<std::byte> scratch(gemms.scratch_bytes(whole) + 256);
    void* begin = scratch.data();
    size_t space = scratch.size();
    std::align(256, 1, begin, space);
    for (const auto& [first, last] : {std::pair{0, 1}, {1, 33}, {33, 70}}) {
      for (int32_t column = 0; column < columns; column += is_cut ? 64 : columns) {
        GemmArgs part = whole;
        if (is_cut) {
          part.row_begin = first;
          part.row_end = last;
          part.columns = 64;
          part.fp8.b += column * depth;
          part.fp8.b_scales += column;
          part.d = whole.is_gated ? static_cast<void*>(halves.data() + column / 2)
                                  : static_cast<void*>(floats.data() + column);
        }
        if (!is_cut && first > 0)
          continue;
        gemms.prepare({&part, 1});
        gemms.launch(part, {static_cast<std::byte*>(begin), space}, nullptr);
      }
    }
    std::vector<float> out = floats;
    for (size_t i = 0; whole.is_gated && i < out.size(); ++i)
      out[i] = widen(halves[i]);
    return out;
  }

  std::unique_ptr<GemmSelector> selector(int compute_capability, bool has_library = true) {
    return make_gemm_selector(
        {.compute_capability = compute_capability, .num_multiprocessors = 8},
        {.cublas_lt_libraries =
             has_library ? std::vector<std::string>{FAKE_CUBLAS_LT} : std::vector<std::string>{}});
  }

  std::vector<Bf16> a = waves<Bf16>(rows * depth, 0.7f);
  std::vector<E4m3> codes = std::vector<E4m3>(columns * depth);
  std::vector<float> scales = std::vector<float>(columns);
  std::vector<float> floats = std::vector<float>(rows * ldd);
  std::vector<Bf16> halves = std::vector<Bf16>(rows * ldd);
};

TEST_F(CublasLtFp8, EveryWayGivesTheSameWithinRoundingAndSlicesItsBits) {
  for (const bool is_gated : {false, true}) {
    const GemmArgs whole = product(is_gated, !is_gated);
    const std::vector<float> want = result(*selector(80, false), whole, false);
    for (const int capability : {89, 90, 100}) {
      const int asked = counted("fake_cublas_lt_asked");
      const auto gemms = selector(capability);
      const std::vector<float> got = result(*gemms, whole, false);
      EXPECT_GT(counted("fake_cublas_lt_asked"), asked) << "the library was not used";
      for (size_t i = 0; i < want.size(); ++i)
        ASSERT_NEAR(got[i], want[i], 1e-5 + std::abs(want[i]) * (is_gated ? 1.0 / 128 : 1e-5));
      EXPECT_EQ(result(*gemms, whole, true), got);
    }
  }
}

TEST_F(CublasLtFp8, ALibraryThatRefusesScalesOfRowsIsUsedWithoutThem) {
  const GemmArgs whole = product(false, true);
  const std::vector<float> want = result(*selector(89), whole, false);
  setenv("FAKE_CUBLAS_LT_NO_VECTORS", "1", 1);
  EXPECT_EQ(result(*selector(90), whole, false), want);
  unsetenv("FAKE_CUBLAS_LT_NO_VECTORS");
  setenv("FAKE_CUBLAS_LT_VERSION", "120800", 1);
  EXPECT_EQ(result(*selector(90), whole, false), want) << "not asked of a library before 12.9";
  unsetenv("FAKE_CUBLAS_LT_VERSION");
  EXPECT_EQ(result(*selector(100), whole, false), want) << "nor of other devices than 9.0";
}

TEST_F(CublasLtTest, RefusesWhatItCannotTake) {
  const auto library = load();
  ASSERT_NE(library, nullptr);
  library->prepare(product(5));
  EXPECT_THROW(library->launch(product(5), {}, nullptr), std::invalid_argument);
  const std::span<std::byte> shifted(workspace.data() - 16, workspace.size());
  EXPECT_THROW(library->launch(product(5), shifted, nullptr), std::invalid_argument);
  GemmArgs gated = product(5);
  gated.is_gated = true;
  EXPECT_FALSE(CublasLt::takes(gated));
  EXPECT_THROW(library->prepare(gated), std::invalid_argument);
}

TEST_F(CublasLtTest, KeepsABoundedNumberOfProducts) {
  {
    const auto library = load();
    ASSERT_NE(library, nullptr);
    for (size_t i = 1; i <= CublasLt::kMaxProducts; ++i)
      library->prepare(product(1, static_cast<int32_t>(4 * i)));
    const int live = counted("fake_cublas_lt_live");
    const auto one_more = static_cast<int32_t>(4 * CublasLt::kMaxProducts + 4);
    EXPECT_THROW(library->prepare(product(1, one_more)), std::runtime_error);
    EXPECT_EQ(counted("fake_cublas_lt_live"), live);
    library->prepare(product(1, 4));
    EXPECT_EQ(library->launch(product(1, 4), workspace, nullptr), cudaSuccess);
  }
  EXPECT_EQ(counted("fake_cublas_lt_live"), 0);
}

TEST_F(CublasLtTest, SaysWhyALibraryIsNotUsed) {
  EXPECT_EQ(load({}), nullptr);
  EXPECT_EQ(reason, "no library named");
  EXPECT_EQ(load({"/nowhere/libcublasLt.so.13"}), nullptr);
  EXPECT_NE(reason.find("/nowhere/libcublasLt.so.13"), std::string::npos) << reason;
  EXPECT_EQ(load({"libm.so.6"}), nullptr);
  EXPECT_EQ(reason, "libm.so.6: has no cublasLtGetVersion");
  setenv("FAKE_CUBLAS_LT_VERSION", "110900", 1);
  EXPECT_EQ(load(), nullptr);
  EXPECT_NE(reason.find("version 110900, expected 12 or 13"), std::string::npos) << reason;
  setenv("FAKE_CUBLAS_LT_VERSION", "120405", 1);
  const auto library = load({"/nowhere/libcublasLt.so.13", FAKE_CUBLAS_LT});
  unsetenv("FAKE_CUBLAS_LT_VERSION");
  ASSERT_NE(library, nullptr);
  EXPECT_EQ(reason, "");
  EXPECT_EQ(library->version(), "cublaslt 120405");
}

}  // namespace
}  // namespace flowprefill
