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

#include "devices/cuda/kernels/portable.h"

namespace flowprefill {
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
    for (const int32_t rows : {5, 64, 6, 1})
      library->prepare(product(rows));
    EXPECT_EQ(counted("fake_cublas_lt_asked") - asked, 1);
    EXPECT_EQ(counted("fake_cublas_lt_rows"), 64);
    for (const int32_t rows : {5, 64, 6, 1})
      EXPECT_EQ(library->launch(product(rows), workspace, nullptr), cudaSuccess);
    GemmArgs slice = product(5);
    slice.operator_rows = 3000;
    EXPECT_THROW(library->launch(slice, workspace, nullptr), std::runtime_error);
    library->prepare(slice);
    EXPECT_EQ(counted("fake_cublas_lt_rows"), 2048);
    EXPECT_EQ(counted("fake_cublas_lt_asked") - asked, 2);
    EXPECT_THROW(library->prepare(product(5, 64, 8)), std::runtime_error)
        << "nothing for a depth of 8";
    slice.depth = 24;
    EXPECT_THROW(library->prepare(slice), std::runtime_error) << "131,072 rows want 128 MiB";
    library->prepare(product(5, 64, 24));
  }
  EXPECT_EQ(counted("fake_cublas_lt_live"), 0);
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
