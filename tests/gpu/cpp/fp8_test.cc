// FP8 on the device: rows to e4m3, what widens them, the epilogue; and products with weights in
// e4m3 through the selector, by every candidate the GPU has, cuBLASLt's included where it is.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "device_test.h"
#include "devices/cuda/backend/gemm_candidates.h"

namespace flowprefill::testing {
namespace {

constexpr int32_t kRows = 37;
constexpr int32_t kGap = 16;

size_t area(int32_t rows, int64_t ld) {
  return static_cast<size_t>(rows) * static_cast<size_t>(ld);
}

class Fp8 : public DeviceTest {
 protected:
  std::vector<E4m3> codes(size_t count) {
    std::vector<E4m3> out;
    for (const float value : normals(count, 60.0f))
      out.push_back(to_e4m3(value));
    return out;
  }
  std::vector<float> positive(size_t count, float scale) {
    std::vector<float> out = normals(count, scale);
    for (float& value : out)
      value = std::abs(value) + scale;
    return out;
  }
};

// Codes are exact: one division and one rounding, the same on both sides.
TEST_F(Fp8, RowsAreQuantisedByTheirLargest) {
  for (const int32_t width : {16, 576, 4112}) {
    forget();
    const int32_t ld = width + kGap;
    std::vector<Bf16> values = halves(area(kRows + 1, ld), 3.0f);
    std::fill_n(values.begin() + 2 * ld, ld, Bf16{0});
    values[static_cast<size_t>(3 * ld)] = to_bf16(std::nanf(""));
    values[static_cast<size_t>(4 * ld + 1)] = to_bf16(std::numeric_limits<float>::infinity());
    values[static_cast<size_t>(5 * ld + 2)] = to_bf16(1e-40f);
    auto& in = add("in", std::move(values));
    auto& out = add("out", std::vector<E4m3>(area(kRows + 1, ld), E4m3{0x55}));
    auto& scales = add("scales", filled(kRows + 1));
    const auto args = [&](Place p) {
      return QuantiseArgs{.in = in.at(p),
                          .ld_in = ld,
                          .out = out.at(p),
                          .ld_out = ld,
                          .scales = scales.at(p),
                          .rows = kRows,
                          .width = width};
    };
    expect_kernel([&](cudaStream_t s) { return launch_quantise(args(Place::kDevice), s); },
                  [&] { fake_kernels::quantise(args(Place::kHost)); });
  }
}

TEST_F(Fp8, CodesAreWidened) {
  constexpr int32_t kWidth = 1040;
  auto& in = add("in", codes(area(kRows, kWidth)));
  auto& out = add("out", filled_halves(area(kRows + 1, kWidth)));
  const auto args = [&](Place p) {
    return WidenArgs{in.at(p), kWidth, out.at(p), kWidth, kRows, kWidth};
  };
  expect_kernel([&](cudaStream_t s) { return launch_widen(args(Place::kDevice), s); },
                [&] { fake_kernels::widen_codes(args(Place::kHost)); });
}

TEST_F(Fp8, SumsAreRescaled) {
  constexpr int32_t kColumns = 1056;
  for (const bool is_gated : {false, true}) {
    for (const bool is_float : {false, true}) {
      if (is_gated && is_float)
        continue;
      forget();
      const int32_t width = is_gated ? kColumns / 2 : kColumns;
      auto& in = add("in", normals(area(kRows, kColumns), 100.0f));
      auto& row_scales = add("row_scales", positive(kRows, 0.05f));
      auto& column_scales = add("column_scales", positive(kColumns, 0.1f));
      auto& bias = add("bias", normals(kColumns));
      auto& floats = add("floats", normals(area(kRows + 1, width + kGap)));
      auto& halves_out = add("halves", halves(area(kRows + 1, width + kGap)));
      floats.allow(kFloatRounding, 1e-5);
      halves_out.allow(kOneStep, is_gated ? 2e-3 : 1e-4);
      const auto args = [&](Place p) {
        return RescaleArgs{.in = in.at(p),
                           .ld_in = kColumns,
                           .row_scales = row_scales.at(p),
                           .column_scales = column_scales.at(p),
                           .bias = bias.at(p),
                           .out = is_float ? static_cast<void*>(floats.at(p)) : halves_out.at(p),
                           .ld_out = width + kGap,
                           .output = is_float ? GemmOutput::kFloat : GemmOutput::kBf16,
                           .adds_to_out = !is_gated,
                           .is_gated = is_gated,
                           .scale = is_gated ? 1.0f : 0.5f,
                           .rows = kRows,
                           .columns = kColumns};
      };
      expect_kernel([&](cudaStream_t s) { return launch_rescale(args(Place::kDevice), s); },
                    [&] { fake_kernels::rescale(args(Place::kHost)); });
    }
  }
}

// ---- products

class Fp8Products : public Fp8 {
 protected:
  void make(int32_t rows, int32_t columns, int32_t depth, bool is_gated, bool has_bias) {
    forget();
    rows_ = rows, columns_ = columns, depth_ = depth;
    is_gated_ = is_gated, has_bias_ = has_bias;
    a_ = &add("a", halves(area(rows, depth)));
    codes_ = &add("codes", codes(area(columns, depth)));
    scales_ = &add("scales", positive(static_cast<size_t>(columns), 0.0005f));
    bias_ = &add("bias", normals(static_cast<size_t>(columns)));
    floats_ = &add("d", normals(area(rows, ldd())));
    halves_ = &add("d in bf16", filled_halves(area(rows, ldd())));
    // Tensor cores add products of e4m3 up with fewer bits than a float has.
    floats_->allow(2e-3, 2e-2);
    halves_->allow(0.02, 0.05);
  }
  int64_t ldd() const { return (is_gated_ ? columns_ / 2 : columns_) + kGap; }

  GemmArgs args(Place p, int32_t begin = 0, int32_t end = 0) {
    return {.a = a_->at(p),
            .lda = depth_,
            .fp8 = {.b = codes_->at(p), .b_scales = scales_->at(p)},
            .ldb = depth_,
            .bias = has_bias_ ? bias_->at(p) : nullptr,
            .d = is_gated_ ? static_cast<void*>(halves_->at(p)) : floats_->at(p),
            .ldd = ldd(),
            .output = is_gated_ ? GemmOutput::kBf16 : GemmOutput::kFloat,
            .adds_to_d = !is_gated_,
            .is_gated = is_gated_,
            .row_begin = begin,
            .row_end = end == 0 ? rows_ : end,
            .columns = columns_,
            .depth = depth_,
            .operator_rows = rows_,
            .operator_columns = columns_};
  }

  std::unique_ptr<GemmSelector> selector(bool has_library) {
    std::vector<std::string> names;
    if (has_library)
      names = {"libcublasLt.so.13", "libcublasLt.so"};
    std::string failure;
    auto found = make_gemm_selector({.compute_capability = gpu_.compute_capability,
                                     .num_multiprocessors = gpu_.num_multiprocessors,
                                     .name = gpu_.name},
                                    {.cublas_lt_libraries = names}, &failure);
    if (has_library && !failure.empty())  // else a run would seem to have tried it
      std::printf("without cuBLASLt: %s\n", failure.c_str());
    return found;
  }

  // By plain loops over codes.
  void compute_on_host() {
    std::vector<E4m3> rows(area(rows_, depth_));
    std::vector<float> row_scales(static_cast<size_t>(rows_));
    std::vector<Bf16> wide_rows(rows.size()), wide(codes_->host().size());
    std::vector<float> sums(area(rows_, columns_));
    const GemmArgs all = args(Place::kHost);
    fake_kernels::quantise({all.a, depth_, rows.data(), depth_, row_scales.data(), rows_, depth_});
    fake_kernels::widen_codes({rows.data(), depth_, wide_rows.data(), depth_, rows_, depth_});
    fake_kernels::widen_codes({all.fp8.b, depth_, wide.data(), depth_, columns_, depth_});
    fake_kernels::gemm({.a = wide_rows.data(),
                        .lda = depth_,
                        .b = wide.data(),
                        .ldb = depth_,
                        .d = sums.data(),
                        .ldd = columns_,
                        .row_end = rows_,
                        .columns = columns_,
                        .depth = depth_});
    fake_kernels::rescale({.in = sums.data(),
                           .ld_in = columns_,
                           .row_scales = row_scales.data(),
                           .column_scales = all.fp8.b_scales,
                           .bias = all.bias,
                           .out = all.d,
                           .ld_out = all.ldd,
                           .output = all.output,
                           .adds_to_out = all.adds_to_d,
                           .is_gated = all.is_gated,
                           .rows = rows_,
                           .columns = columns_});
  }

  void expect_product() {
    for (const bool has_library : {true, false}) {
      const auto gemms = selector(has_library);
      const DeviceBuffer scratch(gemms->scratch_bytes(args(Place::kDevice)));
      const std::span<std::byte> bytes(scratch.get(), scratch.bytes());
      const GemmArgs whole = args(Place::kDevice);
      gemms->prepare({&whole, 1});
      const auto launch = [&](cudaStream_t s) {
        gemms->launch(whole, bytes, s);
        return cudaSuccess;
      };
      expect_kernel(launch, [&] { compute_on_host(); });
      const auto together = run(launch);
      const auto cut = run([&](cudaStream_t s) {
        for (const auto& [begin, end] : {std::pair{0, 1}, {1, rows_ / 2}, {rows_ / 2, rows_}})
          gemms->launch(args(Place::kDevice, begin, end), bytes, s);
        return cudaSuccess;
      });
      EXPECT_EQ(together, cut) << "slices of rows, " << (has_library ? "cuBLASLt" : "tiles");
    }
  }

  int32_t rows_ = 0, columns_ = 0, depth_ = 0;
  bool is_gated_ = false, has_bias_ = false;
  Array<Bf16>* a_ = nullptr;
  Array<E4m3>* codes_ = nullptr;
  Array<float>* scales_ = nullptr;
  Array<float>* bias_ = nullptr;
  Array<float>* floats_ = nullptr;
  Array<Bf16>* halves_ = nullptr;
};

TEST_F(Fp8Products, AreThoseOfCodesAndSlicesHaveTheBitsOfTheWhole) {
  const int32_t scale = kIsDouble ? 8 : 1;
  for (const bool is_gated : {false, true}) {
    make(90, 1024 / scale, 512 / scale, is_gated, is_gated);
    expect_product();
  }
  // Of few rows, for which there is a kernel of our own.
  make(4, 256 / scale, 512 / scale, false, true);
  expect_product();
  make(16, 1056, 2048 / scale + 16, false, false);
  expect_product();
  make(11, 1024 / scale, 4096 / scale, true, true);
  expect_product();
}

}  // namespace
}  // namespace flowprefill::testing
