// The row kernels on the device: embedding, rotary table, RMS norm, residual, rounding, cap, gate.
// Rows lie apart by more than their width and there is a row too many: what lies between is not to
// be touched.
#include <algorithm>
#include <cmath>

#include "device_test.h"

namespace flowprefill::testing {
namespace {

constexpr int32_t kRows = 37;
constexpr int32_t kGap = 8;

size_t area(int32_t rows, int32_t ld) {
  return static_cast<size_t>(rows) * static_cast<size_t>(ld);
}

// Rows of a batch with padding at its end and one in its midst.
std::vector<int32_t> sequences(int32_t rows) {
  std::vector<int32_t> out;
  for (int32_t row = 0; row < rows; ++row)
    out.push_back(row == 5 || row >= rows - 4 ? 0 : 1 + row % 3);
  return out;
}

class RowKernels : public DeviceTest {
 protected:
  std::vector<int32_t> integers(int32_t count, int32_t low, int32_t high) {
    std::vector<int32_t> out(static_cast<size_t>(count));
    std::ranges::generate(out, [&] { return integer(low, high); });
    return out;
  }
};

TEST_F(RowKernels, EmbeddingCopiesRowsAndClearsPadding) {
  constexpr int32_t kVocab = 50;
  for (const int32_t width : {8, 576, 2056}) {
    forget();
    const int32_t ld = width + kGap;
    auto& tokens = add("tokens", integers(kRows, 0, kVocab - 1));
    auto& of_row = add("sequences", sequences(kRows));
    auto& table = add("table", halves(area(kVocab, ld)));
    auto& hidden = add("hidden", filled(area(kRows + 1, ld)));
    const auto args = [&](Place p) {
      return EmbedArgs{.batch = {.tokens = tokens.at(p), .sequences = of_row.at(p)},
                       .table = table.at(p),
                       .ld_table = ld,
                       .hidden = hidden.at(p),
                       .ld_hidden = ld,
                       .rows = kRows,
                       .width = width,
                       .scale = width == 8 ? 1.0f : 24.5f};
    };
    expect_kernel([&](cudaStream_t s) { return launch_embed(args(Place::kDevice), s); },
                  [&] { fake_kernels::embed(args(Place::kHost)); });
  }
}

TEST_F(RowKernels, RotaryTableIsExactAtLargePositions) {
  for (const int32_t head_dim : {64, 96, 128}) {
    forget();
    std::vector<double> turns;
    for (int32_t i = 0; i < head_dim / 2; ++i)
      turns.push_back(std::pow(10000.0, -2.0 * i / head_dim) / 6.283185307179586);
    auto& of_row = add("sequences", sequences(kRows));
    auto& positions = add("positions", integers(kRows, 0, 131071));
    auto& frequencies = add("turns_per_position", turns);
    auto& rotary = add("rotary", filled(area(kRows + 1, head_dim)));
    rotary.allow(0.0, kFloatRounding);
    const auto args = [&](Place p) {
      return RotaryArgs{.batch = {.sequences = of_row.at(p), .positions = positions.at(p)},
                        .turns_per_position = frequencies.at(p),
                        .scale = 1.1f,
                        .rotary = rotary.at(p),
                        .rows = kRows,
                        .turning = head_dim};
    };
    expect_kernel([&](cudaStream_t s) { return launch_rotary(args(Place::kDevice), s); },
                  [&] { fake_kernels::rotary(args(Place::kHost)); });
  }
}

TEST_F(RowKernels, RmsNorm) {
  for (const int32_t width : {4, 576, 4100}) {
    forget();
    const int32_t ld = width + kGap;
    auto& hidden = add("hidden", normals(area(kRows + 1, ld), 3.0f));
    auto& weight = add("weight", normals(static_cast<size_t>(width)));
    auto& out = add("out", filled_halves(area(kRows + 1, ld)));
    out.allow(kOneStep, 1e-30);
    const auto args = [&](Place p) {
      return RmsNormArgs<Bf16>{.hidden = hidden.at(p),
                               .ld_hidden = ld,
                               .weight = weight.at(p),
                               .out = out.at(p),
                               .ld_out = ld,
                               .rows = kRows,
                               .width = width,
                               .eps = 1e-5f};
    };
    expect_kernel([&](cudaStream_t s) { return launch_rms_norm(args(Place::kDevice), s); },
                  [&] { fake_kernels::rms_norm(args(Place::kHost)); });
  }
}

TEST_F(RowKernels, ResidualAddsAScaledBranchOrItsNorm) {
  for (const int32_t width : {4, 576, 4100}) {
    for (const bool has_norm : {false, true}) {
      forget();
      const int32_t ld = width + kGap;
      auto& in = add("in", normals(area(kRows + 1, ld), 2.0f));
      auto& weight = add("weight", normals(static_cast<size_t>(width)));
      auto& hidden = add("hidden", normals(area(kRows + 1, ld), 3.0f));
      hidden.allow(4 * kFloatRounding, 1e-5);
      const auto args = [&](Place p) {
        return ResidualArgs{.in = in.at(p),
                            .ld_in = ld,
                            .weight = has_norm ? weight.at(p) : nullptr,
                            .hidden = hidden.at(p),
                            .ld_hidden = ld,
                            .rows = kRows,
                            .width = width,
                            .scale = 0.22f,
                            .eps = 1e-5f};
      };
      expect_kernel([&](cudaStream_t s) { return launch_residual(args(Place::kDevice), s); },
                    [&] { fake_kernels::residual(args(Place::kHost)); });
    }
  }
}

TEST_F(RowKernels, RoundRoundsToNearest) {
  for (const int32_t width : {8, 576, 2056}) {
    forget();
    const int32_t ld = width + kGap;
    auto& in = add("in", normals(area(kRows + 1, ld), 100.0f));
    auto& out = add("out", filled_halves(area(kRows + 1, ld)));
    const auto args = [&](Place p) {
      return RoundArgs{.in = in.at(p),
                       .ld_in = ld,
                       .out = out.at(p),
                       .ld_out = ld,
                       .rows = kRows,
                       .width = width};
    };
    expect_kernel([&](cudaStream_t s) { return launch_round(args(Place::kDevice), s); },
                  [&] { fake_kernels::round(args(Place::kHost)); });
  }
}

TEST_F(RowKernels, SoftcapBoundsValues) {
  for (const int32_t width : {4, 516, 2056}) {
    forget();
    const int32_t ld = width + kGap;
    auto& values = add("values", normals(area(kRows + 1, ld), 40.0f));
    values.initial()[0] = 1e30f;
    values.initial()[1] = -1e30f;
    values.allow(4 * kFloatRounding, 1e-4);
    const auto args = [&](Place p) {
      return SoftcapArgs{
          .values = values.at(p), .ld_values = ld, .rows = kRows, .width = width, .cap = 30.0f};
    };
    expect_kernel([&](cudaStream_t s) { return launch_softcap(args(Place::kDevice), s); },
                  [&] { fake_kernels::softcap(args(Place::kHost)); });
  }
}

TEST_F(RowKernels, RmsNormOfPickedRowsClearsPadding) {
  constexpr int32_t kWidth = 576;
  auto& hidden = add("hidden", normals(area(kRows, kWidth)));
  auto& weight = add("weight", normals(kWidth));
  auto& rows_in = add("rows_in", std::vector<int32_t>{36, 0, -1, 17, 17, -1});
  auto& out = add("out", filled_halves(area(7, kWidth)));
  out.allow(kOneStep, 1e-30);
  const auto args = [&](Place p) {
    return RmsNormArgs<Bf16>{.hidden = hidden.at(p),
                             .ld_hidden = kWidth,
                             .weight = weight.at(p),
                             .rows_in = rows_in.at(p),
                             .out = out.at(p),
                             .ld_out = kWidth,
                             .rows = 6,
                             .width = kWidth,
                             .eps = 1e-6f};
  };
  expect_kernel([&](cudaStream_t s) { return launch_rms_norm(args(Place::kDevice), s); },
                [&] { fake_kernels::rms_norm(args(Place::kHost)); });
}

template <typename In>
std::vector<In> as(const std::vector<float>& values) {
  std::vector<In> out(values.size());
  for (size_t i = 0; i < values.size(); ++i)
    store(values[i], &out[i]);
  return out;
}

class Gate : public RowKernels {
 protected:
  template <typename In>
  void test(bool is_gelu) {
    for (const int32_t width : {8, 1536, 1160}) {
      forget();
      auto& in = add("in", as<In>(normals(area(kRows, 2 * width + kGap), 4.0f)));
      // exp() of a large gate overflows to infinity, and the answer is 0 or the product.
      store(-200.0f, &in.initial()[0]);
      store(200.0f, &in.initial()[2]);
      auto& out = add("out", filled_halves(area(kRows + 1, width + kGap)));
      // Where tanh is near -1, the plain formula of GELU cancels.
      out.allow(kOneStep, is_gelu ? 1e-12 : 1e-30);
      const auto args = [&](Place p) {
        return GateArgs<In>{.in = in.at(p),
                            .ld_in = 2 * width + kGap,
                            .out = out.at(p),
                            .ld_out = width + kGap,
                            .rows = kRows,
                            .width = width,
                            .is_gelu = is_gelu};
      };
      expect_kernel([&](cudaStream_t s) { return launch_gate(args(Place::kDevice), s); },
                    [&] { fake_kernels::gate(args(Place::kHost)); });
    }
  }
};

TEST_F(Gate, OfFloats) {
  test<float>(false);
  test<float>(true);
}
TEST_F(Gate, OfHalves) {
  test<Bf16>(false);
  test<Bf16>(true);
}

}  // namespace
}  // namespace flowprefill::testing
