// GemmSelector over the double of the CUDA runtime, whose clock is exact: candidates of chosen
// durations, failures, the file of choices; and the real candidates over doubles of their launches.
#include "devices/cuda/backend/gemm_selector.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>
#include <stdexcept>

#include "devices/cuda/backend/gemm_candidates.h"
#include "devices/cuda/kernels/kernels.h"
#include "devices/cuda/kernels/row_bodies.h"
#include "devices/cuda/runtime/stream.h"
#include "fake_cudart.h"
#include "reference.h"

namespace flowprefill {
namespace {

namespace fs = std::filesystem;

// What the doubles below were called with; how long their kernels take, by tile.
struct Launches {
  std::vector<std::string> names = {};
  std::vector<GemmArgs> gemms = {};
  std::vector<GateArgs<Bf16>> gates = {};
  std::map<GemmTile, int64_t> gemm_ns = {};
  bool computes = true;
} launches;

float value(const Bf16* matrix, int64_t ld, int64_t row, int64_t column) {
  return widen(matrix[row * ld + column]);
}

void multiply(const GemmArgs& args) {
  for (int32_t row = args.row_begin; row < args.row_end; ++row) {
    for (int32_t column = 0; column < args.d_columns(); ++column) {
      float sums[2] = {};
      const int parts = args.is_gated ? 2 : 1;
      for (int part = 0; part < parts; ++part) {
        for (int32_t k = 0; k < args.depth; ++k)
          sums[part] +=
              value(args.a, args.lda, row, k) * value(args.b, args.ldb, parts * column + part, k);
      }
      static_cast<Bf16*>(args.d)[row * args.ldd + column] =
          to_bf16(args.is_gated ? flowprefill::gated(args.is_gelu, sums[0], sums[1]) : sums[0]);
    }
  }
}

}  // namespace

// In place of csrc/devices/cuda/kernels.
cudaError_t launch_gemm(const GemmArgs& args, GemmTile tile, cudaStream_t stream) {
  check(args);
  launches.names.emplace_back(gemm_tile_name(tile));
  launches.gemms.push_back(args);
  const auto known = launches.gemm_ns.find(tile);
  const auto work =
      launches.computes ? [](const GemmArgs& a) { multiply(a); } : [](const GemmArgs&) {};
  return fake_cudart::launch_kernel(
      stream, [args, work] { work(args); },
      known == launches.gemm_ns.end() ? 50'000 : known->second);
}

template <>
cudaError_t launch_gate<Bf16>(const GateArgs<Bf16>& args, cudaStream_t stream) {
  check(args);
  launches.names.emplace_back("gate");
  launches.gates.push_back(args);
  const bool computes = launches.computes;
  return fake_cudart::launch_kernel(
      stream,
      [args, computes] {
        for (int32_t row = 0; computes && row < args.rows; ++row) {
          for (int32_t i = 0; i < args.width; ++i)
            args.out[row * args.ld_out + i] =
                to_bf16(flowprefill::gated(args.is_gelu, value(args.in, args.ld_in, row, 2 * i),
                                           value(args.in, args.ld_in, row, 2 * i + 1)));
        }
      },
      5'000);
}

// Of FP8 products, which are not tested here: gemm_fp8_test.cc.
cudaError_t launch_quantise(const QuantiseArgs&, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t launch_widen(const WidenArgs&, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t launch_rescale(const RescaleArgs&, cudaStream_t) {
  return cudaErrorNotSupported;
}

namespace {

class GemmSelection : public testing::Test {
 protected:
  void SetUp() override {
    fake_cudart::reset();
    launches = {};
    folder = fs::temp_directory_path() / ("gemm_selector_test_" + std::to_string(getpid()));
    fs::remove_all(folder);
    path = (folder / "sub" / "gemm.txt").string();
  }
  void TearDown() override {
    fs::remove_all(folder);
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  }

  // A candidate whose kernel takes `us`; records its launches in `ran`.
  GemmCandidate timed(const std::string& name, double us) {
    return {
        .name = name,
        .scratch_bytes = 0,
        .launch = [this, name, us](const GemmArgs& args, std::span<std::byte>, cudaStream_t on) {
          ran.push_back(name);
          weights.push_back(args.b);
          return fake_cudart::launch_kernel(
              on, [] {}, std::llround(us * 1e3));
        }};
  }
  GemmCandidate refused(const std::string& name) {
    GemmCandidate out = timed(name, 1);
    out.launch = [](const GemmArgs&, std::span<std::byte>, cudaStream_t on) {
      fake_cudart::fail_call_of("cudaLaunchKernel", 1, cudaErrorNoKernelImageForDevice);
      return fake_cudart::launch_kernel(on, [] {});
    };
    return out;
  }
  GemmSelector selector(std::vector<GemmCandidate> candidates, GemmDevice of = {}) {
    if (of.name.empty())
      of = device;
    return GemmSelector(of, path, [candidates](const GemmArgs&) { return candidates; });
  }
  std::vector<GemmReport> measure(GemmSelector& of, std::vector<GemmArgs> products) {
    const std::vector<GemmReport> reports = of.measure_all(products, {}, stream.get());
    ran.clear();
    return reports;
  }
  // Name of the candidate that is launched.
  std::string launched(const GemmSelector& of, const GemmArgs& args) {
    ran.clear();
    of.launch(args, {}, stream.get());
    EXPECT_EQ(ran.size(), 1u);
    return ran.empty() ? "" : ran.front();
  }

  static GemmArgs product(int32_t rows = 100, const Bf16* b = nullptr) {
    return {.lda = 64, .b = b, .ldb = 64, .ldd = 256, .row_end = rows, .columns = 256, .depth = 64};
  }

  const GemmDevice device{.compute_capability = 90,
                          .num_multiprocessors = 132,
                          .name = "NVIDIA H100 80GB HBM3",
                          .driver_version = 13000,
                          .runtime_version = 13000,
                          .libraries = "kernels 1"};
  const Stream stream = Stream::make();
  fs::path folder;
  std::string path;
  std::vector<std::string> ran;
  std::vector<const Bf16*> weights;
};

TEST_F(GemmSelection, GuessesTheFirstThenLaunchesTheFastest) {
  GemmSelector of = selector({timed("a", 50), timed("b", 20.5), timed("c", 30)});
  EXPECT_EQ(launched(of, product()), "a");
  const std::vector<GemmReport> reports = measure(of, {product()});
  ASSERT_EQ(reports.size(), 1u);
  EXPECT_EQ(reports[0].chosen, "b");
  EXPECT_FALSE(reports[0].is_from_cache);
  ASSERT_EQ(reports[0].timings.size(), 3u);
  const double want[] = {50, 20.5, 30};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_NEAR(reports[0].timings[i].us, want[i], 0.01);
    EXPECT_EQ(reports[0].timings[i].failure, "");
  }
  EXPECT_EQ(launched(of, product()), "b");
}

TEST_F(GemmSelection, AmongEqualsTheBetterGuessStays) {
  GemmSelector of = selector({timed("a", 50), timed("b", 20), timed("c", 20)});
  EXPECT_EQ(measure(of, {product()})[0].chosen, "b");
}

TEST_F(GemmSelection, AChoiceIsOfItsShapeOnly) {
  GemmSelector of = selector({timed("a", 50), timed("b", 20)});
  measure(of, {product(100)});
  EXPECT_EQ(launched(of, product(65)), "b");  // 65 to 128 rows are one class
  EXPECT_EQ(launched(of, product(128)), "b");
  EXPECT_EQ(launched(of, product(64)), "a");
  EXPECT_EQ(launched(of, product(129)), "a");
  const auto changed = [](auto change) {
    GemmArgs args = product();
    change(args);
    return args;
  };
  const float bias = 0;
  EXPECT_EQ(launched(of, changed([](GemmArgs& g) { g.columns = 128; })), "a");
  EXPECT_EQ(launched(of, changed([](GemmArgs& g) { g.depth = 32; })), "a");
  EXPECT_EQ(launched(of, changed([&](GemmArgs& g) { g.bias = &bias; })), "a");
  EXPECT_EQ(launched(of, changed([](GemmArgs& g) { g.adds_to_d = true; })), "a");
  EXPECT_EQ(launched(of, changed([](GemmArgs& g) { g.output = GemmOutput::kBf16; })), "a");
  EXPECT_EQ(launched(of, changed([](GemmArgs& g) { g.is_gated = true; })), "a");
  EXPECT_EQ(launched(of, changed([](GemmArgs& g) { g.row_begin = 10; })), "b");
  EXPECT_EQ(launched(of, changed([](GemmArgs& g) { g.operator_rows = 9000; })), "a");
  // A slice has the choice of its operator, whatever its own size.
  EXPECT_EQ(launched(of, changed([](GemmArgs& g) {
                       g.operator_rows = 100;
                       g.row_end = 3;
                       g.operator_columns = 256;
                       g.columns = 64;
                     })),
            "b");
}

TEST_F(GemmSelection, ProductsOfOneShapeTakeTurns) {
  const Bf16 layers[3] = {};
  GemmSelector of = selector({timed("a", 200)});
  measure(of, {product(100, &layers[0]), product(90, &layers[1]), product(80, &layers[2])});
  ASSERT_GT(weights.size(), 6u);
  for (size_t i = 0; i < weights.size(); ++i)
    EXPECT_EQ(weights[i], &layers[i % 3]);
}

TEST_F(GemmSelection, CandidatesThatFailAreLeftOutWithTheirReason) {
  GemmCandidate picky = timed("picky", 1);
  picky.launch = [](const GemmArgs&, std::span<std::byte>, cudaStream_t) -> cudaError_t {
    throw std::runtime_error("needs a full moon");
  };
  GemmSelector of = selector({refused("a"), picky, timed("c", 30), timed("d", 40)});
  const GemmReport report = measure(of, {product()})[0];
  EXPECT_EQ(report.chosen, "c");
  EXPECT_NE(report.timings[0].failure.find("209"), std::string::npos) << report.timings[0].failure;
  EXPECT_EQ(report.timings[1].failure, "needs a full moon");
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  EXPECT_EQ(launched(of, product()), "c");
}

TEST_F(GemmSelection, WhereAllFailTheGuessStaysAndNothingIsCached) {
  {
    GemmSelector of = selector({refused("a"), refused("b")});
    EXPECT_EQ(measure(of, {product()})[0].chosen, "");
    EXPECT_THROW(of.launch(product(), {}, stream.get(), {"o_proj", 3}), CudaError);
  }
  EXPECT_FALSE(fs::exists(path));
}

TEST_F(GemmSelection, ALaunchThatFailsNamesOperatorAndLayer) {
  const GemmSelector of = selector({refused("a")});
  try {
    of.launch(product(), {}, stream.get(), {"o_proj", 3});
    FAIL();
  } catch (const CudaError& error) {
    EXPECT_EQ(error.call(), "a");
    EXPECT_STREQ(error.context().op, "o_proj");
    EXPECT_EQ(error.context().layer, 3);
  }
}

// A library that has no kernel for the product, or a kernel that the device cannot launch.
TEST_F(GemmSelection, AGuessThatIsRefusedFallsToTheNextNowAndLater) {
  GemmCandidate picky = timed("picky", 1);
  int num_asked = 0;
  picky.launch = [&num_asked](const GemmArgs&, std::span<std::byte>, cudaStream_t) -> cudaError_t {
    ++num_asked;
    throw std::runtime_error("nothing for this product");
  };
  const GemmSelector of = selector({picky, refused("b"), timed("c", 30), timed("d", 20)});
  for (int i = 0; i < 3; ++i)
    EXPECT_EQ(launched(of, product()), "c");
  EXPECT_EQ(num_asked, 1);
  EXPECT_EQ(launched(of, product(600)), "c") << "each shape asks for itself";
  EXPECT_EQ(num_asked, 2);
}

TEST_F(GemmSelection, AMeasuredChoiceThatIsRefusedFallsToTheGuess) {
  write_gemm_choices(path, device, {{shape_of(product()), "c"}});
  EXPECT_EQ(launched(selector({timed("a", 50), timed("b", 20), refused("c")}), product()), "a");
}

TEST_F(GemmSelection, AFailureOfTheDeviceOrOfTheCallerIsNoRefusal) {
  GemmCandidate broken = timed("broken", 1);
  broken.launch = [](const GemmArgs&, std::span<std::byte>, cudaStream_t on) {
    fake_cudart::fail_call_of("cudaLaunchKernel", 1, cudaErrorIllegalAddress);
    return fake_cudart::launch_kernel(on, [] {});
  };
  EXPECT_THROW(selector({broken, timed("b", 1)}).launch(product(), {}, stream.get()), CudaError);
  GemmCandidate strict = timed("strict", 1);
  strict.launch = [](const GemmArgs&, std::span<std::byte>, cudaStream_t) -> cudaError_t {
    throw std::invalid_argument("lda: got 3");
  };
  EXPECT_THROW(selector({strict, timed("b", 1)}).launch(product(), {}, stream.get()),
               std::invalid_argument);
  EXPECT_TRUE(ran.empty());
}

TEST_F(GemmSelection, PreparingAsksTheChoiceOncePerShapeAndFindsWhatItRefuses) {
  std::vector<std::pair<std::string, int32_t>> asked;
  const auto prepared = [&](const std::string& name, int32_t most) {
    GemmCandidate out = timed(name, 1);
    out.prepare = [&asked, name, most](const GemmArgs& args) {
      asked.emplace_back(name, args.rows());
      if (args.rows() > most)
        throw std::runtime_error("too many rows");
    };
    return out;
  };
  GemmSelector of = selector({prepared("few", 100), prepared("many", 1000), prepared("c", 1000)});
  const std::vector<GemmArgs> products = {product(100), product(90), product(600)};
  for (int i = 0; i < 2; ++i)
    of.prepare(products);
  const std::vector<std::pair<std::string, int32_t>> once = {
      {"few", 100}, {"few", 600}, {"many", 600}};
  EXPECT_EQ(asked, once);
  EXPECT_EQ(launched(of, product(100)), "few");
  EXPECT_EQ(launched(of, product(600)), "many");
  of.prepare({&(asked.clear(), products.front()), 1});
  EXPECT_TRUE(asked.empty());
  GemmArgs deeper = product(5000);
  deeper.depth = 128;
  deeper.lda = deeper.ldb = 128;
  of.prepare(std::vector<GemmArgs>{deeper});
  EXPECT_EQ(asked.size(), 3u) << "all refuse: nothing is thrown";
  // Who is measured is prepared before.
  asked.clear();
  EXPECT_EQ(measure(of, {product(600)})[0].timings[0].failure, "too many rows");
  EXPECT_EQ(asked.size(), 3u);
}

TEST_F(GemmSelection, WithoutCandidatesSaysWhichDevice) {
  const GemmSelector of = selector({}, {.compute_capability = 75, .name = "old"});
  EXPECT_EQ(of.scratch_bytes(product()), 0u);
  try {
    of.launch(product(), {}, stream.get());
    FAIL();
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("75"), std::string::npos);
  }
}

TEST_F(GemmSelection, ScratchIsEnoughForAnyCandidate) {
  GemmCandidate large = timed("large", 1);
  large.scratch_bytes = 4096;
  EXPECT_EQ(selector({timed("a", 1), large, timed("c", 1)}).scratch_bytes(product()), 4096u);
}

TEST_F(GemmSelection, ADeviceThatBreaksEndsTheMeasurement) {
  GemmCandidate breaking = timed("b", 1);
  breaking.launch = [](const GemmArgs&, std::span<std::byte>, cudaStream_t on) {
    return fake_cudart::launch_kernel(on,
                                      [] { fake_cudart::break_device(cudaErrorIllegalAddress); });
  };
  GemmSelector of = selector({timed("a", 5), breaking});
  EXPECT_THROW(measure(of, {product()}), CudaError);
  fake_cudart::reset();
}

TEST_F(GemmSelection, ALaunchCanBeCaptured) {
  const GemmSelector of = selector({timed("a", 5)});
  cudaGraph_t graph = nullptr;
  size_t nodes = 0;
  FP_CUDA(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
  of.launch(product(), {}, stream.get());
  FP_CUDA(cudaStreamEndCapture(stream.get(), &graph));
  FP_CUDA(cudaGraphGetNodes(graph, nullptr, &nodes));
  EXPECT_EQ(nodes, 1u);
  FP_CUDA(cudaGraphDestroy(graph));
}

// ---- the file of choices

TEST_F(GemmSelection, TheFileSparesTheNextStartTheMeasurement) {
  GemmSelector first = selector({timed("a", 50), timed("b + c", 20)});
  measure(first, {product(100), product(600)});
  EXPECT_EQ(first.cache_failure(), "");
  GemmSelector second = selector({timed("a", 50), timed("b + c", 20)});
  EXPECT_EQ(launched(second, product()), "b + c");
  const size_t before = fake_cudart::count("cudaLaunchKernel");
  const std::vector<GemmReport> reports = measure(second, {product(100), product(600)});
  EXPECT_EQ(fake_cudart::count("cudaLaunchKernel"), before);
  ASSERT_EQ(reports.size(), 2u);
  for (const GemmReport& report : reports) {
    EXPECT_TRUE(report.is_from_cache);
    EXPECT_EQ(report.chosen, "b + c");
  }
  // A new shape is measured and joins the others.
  EXPECT_FALSE(measure(second, {product(9)})[0].is_from_cache);
  EXPECT_EQ(read_gemm_choices(path, device).size(), 3u);
}

TEST_F(GemmSelection, AFileOfAnotherDeviceOrVersionIsNotUsed) {
  const GemmChoices choices = {{shape_of(product()), "b"}};
  write_gemm_choices(path, device, choices);
  EXPECT_EQ(read_gemm_choices(path, device), choices);
  const auto differs = [&](auto change) {
    GemmDevice other = device;
    change(other);
    return read_gemm_choices(path, other).empty();
  };
  EXPECT_TRUE(differs([](GemmDevice& d) { d.name = "NVIDIA H100 PCIe"; }));
  EXPECT_TRUE(differs([](GemmDevice& d) { d.compute_capability = 80; }));
  EXPECT_TRUE(differs([](GemmDevice& d) { d.num_multiprocessors = 114; }));
  EXPECT_TRUE(differs([](GemmDevice& d) { d.driver_version = 13010; }));
  EXPECT_TRUE(differs([](GemmDevice& d) { d.runtime_version = 12080; }));
  EXPECT_TRUE(differs([](GemmDevice& d) { d.libraries = "kernels 2"; }));
  GemmDevice other = device;
  other.runtime_version = 12080;
  GemmSelector of = selector({timed("a", 10), timed("b", 20)}, other);
  EXPECT_EQ(measure(of, {product()})[0].chosen, "a");
  EXPECT_EQ(read_gemm_choices(path, other).size(), 1u);
}

TEST_F(GemmSelection, ADamagedFileIsNotUsed) {
  GemmArgs gated = product(5000);
  gated.is_gated = true;
  const GemmChoices choices = {{shape_of(product()), "b"}, {shape_of(gated), "c + gate"}};
  write_gemm_choices(path, device, choices);
  std::string text;
  std::getline(std::ifstream(path, std::ios::binary), text, '\0');
  const auto read = [&](const std::string& content) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << content;
    return read_gemm_choices(path, device);
  };
  for (size_t length = 0; length < text.size(); ++length)
    EXPECT_TRUE(read(text.substr(0, length)).empty()) << "cut off after " << length;
  for (const char* line :
       {"x 256 64 0 0 0 0 0 b\n", "128 256 64 2 0 0 0 0 b\n", "128 256 64 0 0 0 0 2 b\n",
        "128 256 64 0 0 0 0 0\n", "128 256 64 0 0 0 0 0 b\n", "\n"}) {
    std::string damaged = text;
    damaged.insert(text.find("128 256"), line);
    EXPECT_TRUE(read(damaged).empty()) << line;
  }
  EXPECT_TRUE(read(std::string(3000, '\xff')).empty());
  EXPECT_EQ(read(text), choices);
}

TEST_F(GemmSelection, AFileThatNamesAnUnknownCandidateMeansTheGuess) {
  write_gemm_choices(path, device, {{shape_of(product()), "cublaslt"}});
  EXPECT_EQ(launched(selector({timed("a", 50), timed("b", 20)}), product()), "a");
}

TEST_F(GemmSelection, AFileThatCannotBeWrittenIsReported) {
  fs::create_directories(path);  // a folder in its place
  GemmSelector of = selector({timed("a", 50), timed("b", 20)});
  EXPECT_EQ(measure(of, {product()})[0].chosen, "b");
  EXPECT_NE(of.cache_failure().find(path), std::string::npos) << of.cache_failure();
  EXPECT_EQ(launched(of, product()), "b");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder / "sub"), {}), 1);  // nothing unfinished
}

// ---- the real candidates

class RealCandidates : public GemmSelection {
 protected:
  static constexpr int32_t kRows = 5, kColumns = 32, kDepth = 16, kLdd = 24;

  RealCandidates() {
    for (size_t i = 0; i < std::size(a); ++i)
      a[i] = to_bf16(std::sin(static_cast<float>(i)));
    for (size_t i = 0; i < std::size(b); ++i)
      b[i] = to_bf16(std::cos(static_cast<float>(i) * 1.7f));
  }
  GemmArgs gated() {
    return {.a = a,
            .lda = kDepth,
            .b = b,
            .ldb = kDepth,
            .d = d,
            .ldd = kLdd,
            .output = GemmOutput::kBf16,
            .is_gated = true,
            .row_begin = 1,
            .row_end = kRows,
            .columns = kColumns,
            .depth = kDepth};
  }
  std::unique_ptr<GemmSelector> real(int compute_capability) {
    GemmDevice of = device;
    of.compute_capability = compute_capability;
    std::string failure;
    auto out =
        make_gemm_selector(of, {.cublas_lt_libraries = {"/nowhere/libcublasLt.so.13"}}, &failure);
    EXPECT_NE(failure, "");
    return out;
  }
  static std::vector<std::string> names(const GemmReport& report) {
    std::vector<std::string> out;
    for (const GemmTiming& timing : report.timings)
      out.push_back(timing.failure.empty() ? timing.candidate : timing.failure);
    return out;
  }
  void expect_result() {
    for (int32_t row = 0; row < kRows; ++row) {
      for (int32_t i = 0; i < kLdd; ++i) {
        const float got = widen(d[row * kLdd + i]);
        if (row == 0 || i >= kColumns / 2) {
          EXPECT_EQ(got, 0.0f);
          continue;
        }
        double sums[2] = {};
        for (int part = 0; part < 2; ++part) {
          for (int32_t k = 0; k < kDepth; ++k)
            sums[part] += value(a, kDepth, row, k) * value(b, kDepth, 2 * i + part, k);
        }
        const double want = reference::silu(sums[0]) * sums[1];
        EXPECT_NEAR(got, want, std::abs(want) / 64 + 1e-3);
      }
    }
  }

  alignas(16) Bf16 a[kRows * kDepth];
  alignas(16) Bf16 b[kColumns * kDepth];
  alignas(16) Bf16 d[kRows * kLdd] = {};
};

TEST_F(RealCandidates, AProductHasTheTilesOfTheDevice) {
  GemmArgs plain = gated();
  plain.is_gated = false;
  plain.columns = 16;
  auto of = real(80);
  EXPECT_EQ(
      names(of->measure_all({&plain, 1}, {}, stream.get())[0]),
      (std::vector<std::string>{"few_rows", "ampere_64x64", "ampere_128x128", "ampere_256x128"}));
  EXPECT_EQ(of->scratch_bytes(plain), 0u);
}

TEST_F(RealCandidates, AGatedProductIsFusedOrInTwoWithTheSameResult) {
  const GemmArgs args = gated();
  const std::map<GemmTile, std::string> fastest = {
      {GemmTile::kAmpere128x128, "ampere_128x128"},
      {GemmTile::kHopper128x256, "hopper_128x256 + gate"}};
  for (const auto& [tile, name] : fastest) {
    auto of = real(90);
    launches.gemm_ns = {{tile, 10'000}};
    std::vector<std::byte> memory(of->scratch_bytes(args) + 16);
    void* aligned = memory.data();
    size_t space = memory.size();
    std::align(16, 1, aligned, space);
    const std::span<std::byte> scratch(static_cast<std::byte*>(aligned), space);
    EXPECT_EQ(of->measure_all({&args, 1}, scratch, stream.get())[0].chosen, name);
    std::fill(std::begin(d), std::end(d), Bf16{0});
    of->launch(args, scratch, stream.get());
    stream.synchronize();
    expect_result();
  }
}

TEST_F(RealCandidates, OfAHopperTheGuessForLargeGatedProductsIsInTwo) {
  GemmArgs args = gated();
  launches.computes = false;
  args.columns = 28672;
  args.ldd = 14336;
  args.row_end = 4096;
  std::vector<std::byte> none;
  auto of = real(90);
  // Only addresses are used: nothing is computed.
  const std::span<std::byte> scratch(reinterpret_cast<std::byte*>(uintptr_t{1} << 30),
                                     of->scratch_bytes(args));
  of->launch(args, scratch, stream.get());
  EXPECT_EQ(launches.names, (std::vector<std::string>{"hopper_128x256", "gate"}));
  EXPECT_EQ(of->num_kernels(args), 2);
  launches.names.clear();
  real(80)->launch(args, scratch, stream.get());
  EXPECT_EQ(launches.names, std::vector<std::string>{"ampere_256x128"});
  EXPECT_EQ(real(80)->num_kernels(args), 1);
}

TEST_F(RealCandidates, GateAndUpOfManyRowsPassThroughScratchInParts) {
  GemmArgs args = gated();
  launches.computes = false;
  args.columns = 1 << 17;  // 256 KiB a row: 1024 rows at once
  args.ldd = 1 << 16;
  args.row_begin = 8;
  args.row_end = 8 + 2500;
  auto of = real(90);
  const size_t bytes = of->scratch_bytes(args);
  EXPECT_EQ(bytes, size_t{256} << 20);
  GemmArgs odd = args;
  odd.columns = 48;
  odd.row_end = odd.row_begin + 5;
  EXPECT_EQ(of->scratch_bytes(odd), 512u) << "5 rows of 96 bytes, and what follows is aligned";
  auto* memory = reinterpret_cast<std::byte*>(uintptr_t{1} << 40);
  of->launch(args, {memory, bytes}, stream.get());
  ASSERT_EQ(launches.gemms.size(), 3u);
  ASSERT_EQ(launches.gates.size(), 3u);
  EXPECT_EQ(of->num_kernels(args), 6);
  const int32_t begins[] = {0, 1024, 2048, 2500};
  for (size_t i = 0; i < 3; ++i) {
    const GemmArgs& part = launches.gemms[i];
    const GateArgs<Bf16>& gate = launches.gates[i];
    EXPECT_EQ(part.first_a(), args.a + (8 + begins[i]) * args.lda);
    EXPECT_EQ(part.rows(), begins[i + 1] - begins[i]);
    EXPECT_EQ(part.d, memory);
    EXPECT_EQ(part.ldd, args.columns);
    EXPECT_FALSE(part.is_gated);
    EXPECT_EQ(static_cast<const void*>(gate.in), memory);
    EXPECT_EQ(gate.out, static_cast<Bf16*>(args.d) + (8 + begins[i]) * args.ldd);
    EXPECT_EQ(gate.rows, part.rows());
    EXPECT_EQ(gate.width, args.columns / 2);
  }
  EXPECT_THROW(of->launch(args, {memory, bytes - 1}, stream.get()), std::invalid_argument);
}

}  // namespace
}  // namespace flowprefill
